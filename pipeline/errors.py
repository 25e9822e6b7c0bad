"""The exceptions that end a job with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user: the message is one line that names the thing and the remedy.

    Jobs print the message to stderr and exit with code 2.
    """


class RunError(Exception):
    """A run that cannot go on although nobody made a mistake, such as one that diverged: exit code 1."""
