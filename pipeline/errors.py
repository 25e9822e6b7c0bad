"""The exceptions that end a job with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user: the message is one line that names the thing and the remedy.

    Jobs print the message to stderr and exit with code 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal has ended the command. The message is one line, and jobs exit with 128 and the signal's number.

    Signal handlers raise it. Of what they raise `ray.get` passes on nothing but a bare KeyboardInterrupt.
    """

    def __init__(self, message: str, number: int) -> None:
        """Args: message: what is left, and how it goes on; number: of the signal."""
        super().__init__(message)
        self.number = int(number)


class RunError(Exception):
    """A failure that is no mistake of the user, such as a run that diverged.

    The message is one line, and jobs exit with code 1.
    """


class Diverged(RunError):
    """A loss, or what an update made of the network, is not finite."""
