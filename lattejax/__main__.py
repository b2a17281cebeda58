"""Lists the commands: python -m lattejax"""

import ast
from pathlib import Path

COMMANDS = ("train", "sample", "chat", "serve", "evaluate", "convert", "encode", "plan", "sweep", "benchmark")


def summary(command: str) -> str:
    """The first sentence of a command's docstring, without running the command."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{command}.py").read_text()))
    return text.split("\n\n")[0].split(": python -m")[0].replace("\n", " ").rstrip(":.")


if __name__ == "__main__":
    print("LaTtE-Flow, a vision-language model that also draws. The commands, each with --help:\n")
    for command in COMMANDS:
        print(f"  python -m lattejax.{command:10} {summary(command)}")
    print("\nStart with: python -m lattejax.train --config=digits --workdir=runs/digits")
