"""Checking a chat template: it is a program that comes with a checkpoint, and may loop, or take all memory.

It is rendered once in a process of its own, with limits on time and memory. Run as a program, this module reads the
template from standard input.
"""

import os
import subprocess
import sys
from typing import Any

from lattejax.errors import UserError

SECONDS = 5
MOST_BYTES = 1 << 30  # of that process

TEXT = {"type": "text", "text": "?"}
IMAGE = {"type": "image"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [TEXT]}],
    [{"role": "user", "content": [IMAGE, IMAGE, TEXT]}],
    [
        {"role": "system", "content": [TEXT]},
        {"role": "user", "content": [IMAGE, TEXT]},
        {"role": "assistant", "content": [TEXT]},
        {"role": "user", "content": [TEXT]},
    ],
]


def check_limits(template: str, name: str) -> None:
    """Raises `UserError` for a template that does not end, or needs too much time or memory; not for other errors."""
    command, environment = [sys.executable, "-m", __name__], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command, input=template.encode(), env=environment, capture_output=True, timeout=2 * SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the chat template of {name} takes more than {2 * SECONDS} seconds") from None
    if done.returncode == 1:
        raise UserError(f"the chat template of {name} cannot be used: {done.stdout.decode().strip()}")
    if done.returncode:
        raise UserError(f"the chat template of {name} takes more than {SECONDS} seconds or {MOST_BYTES:,} bytes")


def render_all() -> None:
    """Renders the template from standard input for all `CHATS`, as transformers does."""
    import resource
    from contextlib import suppress

    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says, and writes it as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    for what, limit in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MOST_BYTES)):
        with suppress(ValueError, OSError):  # not on every system
            resource.setrlimit(what, (limit, limit))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"strftime_now": lambda form: "", "raise_exception": _raise_exception}
    try:
        template = environment.from_string(sys.stdin.buffer.read().decode())
        for chat in CHATS:
            for prompt in (False, True):
                with suppress(TemplateError, TypeError):  # it may refuse some chats
                    if len(template.render(messages=chat, add_generation_prompt=prompt)) > MOST_BYTES // 100:
                        raise MemoryError("its text is too long")
    except Exception as error:
        print(f"{type(error).__name__}: {error}"[:300])
        sys.exit(1)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


if __name__ == "__main__":
    render_all()
