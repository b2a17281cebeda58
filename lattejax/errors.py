"""The errors that a user can fix, and what the system refuses, each as one line."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator

LONGEST_LINE = 500
REFUSALS = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied|Too many open files"
    r"|RESOURCE_EXHAUSTED.*|Cannot allocate memory",
    re.IGNORECASE,
)


class UserError(Exception):
    """Bad input. The message is one line: the thing, the value found, what was expected, how to fix it.

    The commands print it unchanged and exit with code 2. Every other exception is a bug and keeps its traceback, unless
    the system refused something (`refusal`).
    """


def require(package: str, extra: str, what: str) -> None:
    """Raises `UserError`, with the install command, if a package that belongs to an extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'lattejax[{extra}]'")


@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
    """Within it, a library parses something of the user's: whatever it raises is a `UserError` about `what`.

    For libraries that raise anything for a malformed file: a KeyError, a ZeroDivisionError, a RecursionError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


WRAPPERS = (RuntimeError, ValueError)  # what libraries raise while they handle what the system refused


def refusal(error: BaseException | None) -> str | None:
    """What the system refused, if that is why an error was raised: a full disk, no permission, too little memory; or
    a package that is missing for a remote path."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return f"out of memory: {error}".removesuffix(": ")
        if isinstance(error, OSError):
            files = [str(file) for file in (error.filename, error.filename2) if file is not None]
            return f"{' -> '.join(files) or type(error).__name__}: {error.strerror or error}"
        if isinstance(error, ImportError) and "nstall" in str(error):  # "Please install gcsfs to access Google Storage"
            return str(error)
        if found := REFUSALS.search(str(error)):
            return f"{found[0]}: {first_line(error)}"
        wraps = isinstance(error, WRAPPERS) and not error.__suppress_context__
        error = error.__cause__ or (error.__context__ if wraps else None)
    return None


def one_line(text: str) -> str:
    """A text as one line of at most `LONGEST_LINE` characters: the middle of a longer one is left out, and bytes of
    file names that are not UTF-8 are escaped."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE * 2 // 3]} … {text[3 - LONGEST_LINE // 3 :]}"
    return text
