"""The exceptions that end a job with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user: the message is one line that names the thing and the remedy.

    Jobs print the message to stderr and exit with code 2.
    """


class RunError(Exception):
    """A failure that is no mistake of the user, such as a run that diverged.

    The message is one line, and jobs exit with code 1.
    """
