"""What the doors have in common: flags in, exit code out."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from lattejax.errors import UserError


def run(main: Callable[[], None], check: Callable[[list[str]], None] = lambda arguments: None) -> None:
    """Parses the flags and runs a door's `main`. Bad input is one line on standard error and exit code 2.

    Args:
      main: takes nothing; reads its flags.
      check: looks at the raw arguments first; raises `UserError`.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            check(argv[1:])
            rest = flags.FLAGS(argv)
            if rest[1:]:
                raise UserError(f"unexpected argument {rest[1]!r}; every argument is a --flag=value")
        except (flags.Error, UserError) as error:
            fail(error)
        return rest

    def guarded(_) -> None:
        try:
            main()
        except UserError as error:
            fail(error)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def fail(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
