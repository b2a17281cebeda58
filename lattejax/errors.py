"""The error a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: the thing, the value found, what was expected, the way out.

    The commands print it as it is and exit with code 2; every other exception is a bug and keeps its traceback.
    """
