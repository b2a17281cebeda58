"""What the commands have in common: flags in, exit code out."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from absl import app, flags, logging

# Set before transformers is imported, which would warn that PyTorch is missing; it is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
from jax.sharding import Mesh

from lattejax import configuration
from lattejax.configuration.earlier import RETIRED
from lattejax.errors import UserError, first_line, one_line, refusal
from lattejax.interrupts import Interrupted, interruptible
from lattejax.parallel import hosts
from lattejax.parallel.mesh import make_mesh
from lattejax.ranges import Natural, Range, range_of

# What a config file raised, at the end of the traceback that config_flags makes a part of its message.
IN_TRACEBACK = re.compile(
    r'Error whilst parsing config file:.*File "(?P<file>[^"]*)", line (?P<line>\d+), in [^\n]*\n'  # the last frame
    r"(?: [^\n]*\n)*(?P<said>.*)",  # its source, then the error
    re.DOTALL,
)
flags.disclaim_key_flags()  # what is defined through the functions below is the calling command's, also in its --help


def run(
    main: Callable[..., None],
    check: Callable[[list[str]], None] = lambda arguments: None,
    commands: tuple[str, ...] = (),
) -> None:
    """Parses the flags and runs a command's `main`. Bad input is one line on standard error and exit code 2.

    Args:
      main: takes nothing, or the command; reads its flags.
      check: checks the raw arguments first; raises `UserError`.
      commands: one of these words must be given beside the flags.
    """

    def parse(argv: list[str]) -> list[str]:
        argv = [argv[0], *map(find_config, map(rename_key, join_config(argv[1:])))]
        sys.argv[:] = argv  # where config_flags looks for overrides
        if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
            app.usage(shorthelp=True, writeto_stdout=True)
            sys.exit(0)
        try:
            check_text(argv[1:])
            check(argv[1:])
            logging.set_verbosity(logging.ERROR)  # what a config file may cause is said below
            rest = flags.FLAGS(argv)
            if not flags.FLAGS["verbosity"].present:
                logging.set_verbosity(logging.WARNING)
            if commands and (not rest[1:] or rest[1] not in commands):
                raise UserError(f"name one of {', '.join(commands)}; found {' '.join(rest[1:]) or 'nothing'}")
            if unexpected := rest[2:] if commands else rest[1:]:
                raise UserError(f"unexpected argument {unexpected[0]!r}; every argument is a --flag=value")
        except (flags.Error, UserError, ValueError) as error:  # a config file reports errors as ValueError
            if "--config must have a value other than None" in str(error) and "--config=" in " ".join(argv):
                error = UserError("--config: get_config() returns None; it must return the config")
            fail(UserError(IN_TRACEBACK.sub(r"\g<said> (\g<file>, line \g<line>)", str(error))))
        except Exception as error:  # a config file is a user's program; and an override may not fit what it returns
            where = traceback.extract_tb(error.__traceback__)[-1]
            if flag := unmatched_override(argv, error):
                fail(UserError(f"{flag}: the experiment states no such key; add it there to override it"))
            fail(UserError(f"--config: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"))
        return rest

    def guarded(argv: list[str]) -> None:
        try:
            with interruptible(hosts.end):
                main(*argv[1:])
        except UserError as error:
            fail(error)
        except Interrupted as interrupted:
            hosts.end(interrupted)
        except BrokenPipeError:  # whoever reads the output has stopped reading
            os._exit(128 + signal.SIGPIPE)
        except Exception as error:
            if (refused := refusal(error)) is None:
                if hosts.is_one_of_several():  # which ends the process here, without the traceback of the line below
                    traceback.print_exc()
                hosts.end_all(hosts.FAILED, first_line(error))
                raise
            logging.vlog(1, "%s", traceback.format_exc())  # with --verbosity=1
            fail(UserError(refused))

    enable_compilation_cache()
    app.run(guarded, flags_parser=parse)


def check_text(arguments: list[str]) -> None:
    """Raises `UserError` for an argument whose bytes are not UTF-8."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{argument.encode(errors='backslashreplace').decode()} is not UTF-8") from None


def rename_key(argument: str) -> str:
    """Takes the old name of a config key for the new one, for one version, and warns."""
    flag, equals, value = argument.partition("=")
    for old, new in RETIRED.items():
        if flag.lstrip("-") in (f"config.{old}", f"config.base.{old}"):
            renamed = flag.removesuffix(old) + new
            if value == "0":  # none
                renamed, value = renamed.removesuffix("images") + "at", "never"
            print(f"warning: {flag} is an old name; use {renamed}={value}", file=sys.stderr)
            return f"{renamed}{equals}{value}"
    return argument


def join_config(arguments: list[str]) -> list[str]:
    """Takes --config FILE for --config=FILE."""
    places = [i for i, argument in enumerate(arguments[:-1]) if argument in ("-config", "--config")]
    if not places:
        return arguments
    i = places[0]
    return [*arguments[:i], f"{arguments[i]}={arguments[i + 1]}", *arguments[i + 2 :]]


def find_config(argument: str) -> str:
    """Resolves --config=digits or --config=ablations:compute to the packaged experiment, unless a file of that name
    exists."""
    flag, _, value = argument.partition("=")
    name, colon, variant = value.partition(":")
    packaged = Path(__file__).with_name("experiments") / f"{name}.py"
    is_name = flag.lstrip("-") == "config" and re.fullmatch(r"\w+", name) and not os.path.isfile(name)
    return f"{flag}={packaged}{colon}{variant}" if is_name and os.path.isfile(packaged) else argument


def enable_compilation_cache() -> None:
    """Makes JAX cache compilations of over a second in the user's cache directory, unless another is configured."""
    if jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "lattejax"))


def define_number(name: str, default: float | None, text: str, kind: Any) -> flags.FlagHolder:
    """Defines a flag for a number of an annotated type, see `ranges`."""
    return flags.DEFINE(NumberParser(*range_of(kind)), name, default, text, serializer=flags.ArgumentSerializer())


def define_path(name: str, default: str | None, text: str) -> flags.FlagHolder:
    """Defines a flag for a file or a directory."""
    return flags.DEFINE(PathParser(), name, default, text, serializer=flags.ArgumentSerializer())


def define_paths(name: str, text: str) -> flags.FlagHolder:
    """Defines a flag for any number of files."""
    return flags.DEFINE_multi(PathParser(), flags.ArgumentSerializer(), name, [], text)


def define_checkpoint() -> flags.FlagHolder:
    """Defines the flag that chooses among a run's checkpoints, see `Run.checkpoint`."""
    text = 'The step of a checkpoint of the run, or "best", see config.checkpoint.best; by default the latest.'
    return flags.DEFINE_string("checkpoint", "", text)


class PathParser(flags.ArgumentParser):
    """Parses a path."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument.strip():
            raise ValueError("it is empty; give a path, or leave the flag out")
        return argument

    def flag_type(self) -> str:
        return "path"


class NumberParser(flags.ArgumentParser):
    """Parses a number in a range."""

    def __init__(self, kind: type, allowed: Range):
        self.kind, self.allowed, self.syntactic_help = kind, allowed, f"a number {allowed}"

    def parse(self, argument: str | float) -> float:
        try:
            value = self.kind(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is no {'integer' if self.kind is int else 'number'}") from None
        if value not in self.allowed:
            raise ValueError(f"it must be {self.allowed}")
        return value

    def flag_type(self) -> str:
        return self.kind.__name__


def define_cluster_flags() -> Callable[[], None]:
    """Defines the flags that connect the processes of a job; returns a function that connects them."""
    cluster = flags.DEFINE_enum(
        "cluster",
        "none",
        hosts.CLUSTERS,
        "How processes connect: auto asks the TPU pod or the scheduler (SLURM, …), explicit uses the flags below.",
    )
    coordinator = flags.DEFINE_string("coordinator", "", "For --cluster=explicit: host:port of process 0.")
    processes = define_number("processes", 0, "For --cluster=explicit: the number of processes.", Natural)
    process = define_number("process", 0, "For --cluster=explicit: this process's index, from 0.", Natural)
    wait = Annotated[int, Range(1, 86_400)]
    seconds = define_number("connect_seconds", 300, "How long the processes wait for each other.", wait)
    return lambda: hosts.connect(cluster.value, coordinator.value, processes.value, process.value, seconds.value)


def read_mesh(sizes: list[str]) -> Mesh:
    """Arranges all devices as --mesh defines: ["fsdp=2", "tensor=-1"]."""
    text = f"--mesh={','.join(sizes)}"
    try:
        by_axis = {axis: int(size) for axis, size in (part.split("=") for part in sizes)}
    except ValueError as error:
        raise UserError(f"{text} must be written like fsdp=2,tensor=-1") from error
    try:
        return make_mesh(by_axis)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from error


def fail(error: Exception) -> None:
    """Ends the process with one line on standard error, in UTF-8, and exit code 2; in a job of several, all of them."""
    line = one_line(f"error: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stderr.buffer.write(line.encode(errors="backslashreplace") + b"\n")
    sys.stderr.flush()
    hosts.end_all(hosts.FAILED, str(error))
    sys.exit(hosts.FAILED)


def unmatched_override(arguments: list[str], error: Exception) -> str:
    """Which override an error of ml_collections is about, such as one of a score's `at` where the experiment states
    none; several if it may be any of them; empty if it is about none, or if the experiment's own program raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, AttributeError | KeyError) or any(frame.name == "get_config" for frame in frames):
        return ""
    said = " ".join(map(str, error.args))
    names = (argument.partition("=")[0] for argument in arguments if argument.startswith("--config."))
    return " or ".join(name for name in names if any(f"'{part}'" in said for part in name.split(".")))


def check_config_flags(arguments: list[str], section: str = "", others: tuple[str, ...] = ()) -> None:
    """Raises `UserError` for a missing config file, or an override of an unknown key, before flags are parsed.

    A run's config is in the file's `section` ("base." in a sweep's); `others` are the keys beside it.
    """
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and not os.path.isfile(value.partition(":")[0]):
            raise UserError(f"--config={value}: there is no such file")
        if name.startswith(f"config.{section}"):
            configuration.check_key(name.removeprefix(f"config.{section}"))
        elif name.startswith("config.") and name.removeprefix("config.") not in others:
            raise UserError(f"unknown config key {name.removeprefix('config.')}; use {section}… or {', '.join(others)}")
