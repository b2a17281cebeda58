"""The error a user can put right."""

import importlib.util


class UserError(Exception):
    """Bad input. The message is one line: the thing, the value found, what was expected, the way out.

    The commands print it as it is and exit with code 2; every other exception is a bug and keeps its traceback.
    """


def need(package: str, extra: str, what: str) -> None:
    """Raises `UserError`, with the command that installs it, where a package that only an extra brings is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'lattejax[{extra}]'")
