"""The error that a user can fix."""

import importlib.util


class UserError(Exception):
    """Bad input. The message is one line: the thing, the value found, what was expected, how to fix it.

    The commands print it unchanged and exit with code 2. Every other exception is a bug and keeps its traceback.
    """


def require(package: str, extra: str, what: str) -> None:
    """Raises `UserError`, with the install command, if a package that belongs to an extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'lattejax[{extra}]'")
