"""The one exception that is a user's mistake and not a defect."""


class UserError(Exception):
    """A mistake of the user: the message is one line that names the thing and the remedy.

    Jobs print the message to stderr and exit with code 2; no traceback is shown.
    """
