"""What the commands have in common: flags, the config behind `--config`, and errors that a person can act on."""

import linecache
import re
import sys
import traceback
from collections.abc import Callable, Collection
from logging import Formatter, LogRecord
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.text import Text

from jaxllm import start, teacher
from jaxllm.config import SCHEMA, check, check_fields, load, unknown_key, wrong_type
from jaxllm.data.folder import FULL

PACKAGE = Path(__file__).resolve().parent
FAILED, INTERRUPTED = 2, 130

# So that --help of a command lists the flags that are defined here for it.
flags.disclaim_key_flags()


class BadConfigFile(Exception):
    """Not a ValueError, because absl would wrap that in words of its own."""


def define_flags() -> None:
    """Defines `--config FILE`, `--config.section.name=value` and `--workdir`; read them with `experiment()`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a file of configs/, or a run's config.json; --config.a.b=value changes a field. A tuple is given as a whole,"
        " --config.train.transforms=\"('nf4', 'lora')\", or part by part, --config.train.transforms=nf4 --config.train.transforms=lora:"
        " it has what all its flags say, and nothing of what the file says",
    )
    flags.FLAGS["config"].parser = _ConfigParser()
    flags.DEFINE_string("workdir", "", "run directory; default: runs/ and the name of the config file")


def experiment() -> tuple[ConfigDict, Path]:
    """(the checked and locked config, the run directory) that the flags ask for."""
    config, workdir, asked = given()
    return resolved(config, workdir, asked), workdir


def resolved(config: ConfigDict, workdir: Path, asked: Collection[str]) -> ConfigDict:
    """The config of a run in `workdir`, with what the models say that it begins with and learns from, and checked.

    asked: see `start.resolve`.
    """
    config = teacher.resolve(start.resolve(config, workdir, asked), workdir, asked)
    check(config)
    return config


def given() -> tuple[ConfigDict, Path, Collection[str]]:
    """(the config as it was given, the run directory, the fields that the command line sets); ValueError if there is no config."""
    flag: Any = flags.FLAGS["config"]
    if flag.value is None:
        raise ValueError(_no_config())
    check_fields(flag.value)
    path = Path(flag.config_filename)
    name = path.resolve().parent.name if path.suffix == ".json" else path.stem
    workdir = Path(flags.FLAGS.workdir or Path("runs", name)).expanduser()
    return flag.value, workdir, config_flags.get_override_values(flag).keys()


def run(main: Callable[[list[str]], int | None], positional: bool = False) -> None:
    """Parses the flags, calls `main(positional arguments)` and ends the process with its exit code (None: 0).

    An error whose text tells what to change is printed without a traceback, exit code 2; a bug keeps its traceback.
    """

    def parse(argv: list[str]) -> list[str]:
        with Explained():
            _check_keys(argv)
            try:
                return flags.FLAGS(argv)
            except SystemExit:
                sys.exit(0)  # absl calls the help that was asked for a failure

    def call(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            logging.get_absl_handler().setFormatter(_Plain())
        with Explained():
            if argv[1:] and not positional:
                raise ValueError(f"unexpected argument '{argv[1]}'.\n  Accepted: flags only, such as --name=value; see --help.")
            return main(argv[1:])

    app.run(call, flags_parser=parse)


class _Plain(Formatter):
    """A log line without the time, the thread and the place in the code, which are for developers."""

    def format(self, record: LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


class Explained:
    """Turns errors that a person can act on into their text and exit code 2."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        del kind, trace
        if isinstance(error, KeyboardInterrupt):
            _print_error("interrupted")
            sys.exit(INTERRUPTED)
        if error is not None and (text := _explanation(error)):
            _print_error(text)
            sys.exit(FAILED)


def _explanation(error: BaseException) -> str:
    """The text for the user, or "" for a bug. Errors with parts (what was given, accepted, to be changed) have several lines."""
    if isinstance(error, flags.IllegalFlagValueError):
        return _illegal_value(str(error))
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error}.\n  Accepted: a disk with room. What was complete is intact: make room and run the same command again."
    if isinstance(error, OSError) and error.filename and error.strerror:
        change = "Correct the path, or its permissions"
        return f"'{error.filename}': {error.strerror}.\n  Accepted: a path that this user can read, or write to.\n  {change}."
    if isinstance(error, flags.Error | OSError | BadConfigFile):
        return str(error)
    if not isinstance(error, ValueError | ImportError):
        return ""
    ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE)
    return str(error) if ours and "\n  " in str(error) else ""


def _print_error(text: str) -> None:
    Console(stderr=True).print(Text("error: ", "bold red"), text, sep="", markup=False, highlight=False, soft_wrap=True)


def _no_config() -> str:
    listed = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "a Python file with get_config()"
    return f"no config is given.\n  Accepted: {listed}, or a run's config.json.\n  Add --config FILE before --config.a.b=value."


def _check_keys(argv: list[str]) -> None:
    """ValueError for `--config.a.b` that the schema does not have, or without a `--config`."""
    keys = [found[1] for argument in argv if (found := re.match(r"--?(?:no)?config\.([^=]+)", argument))]
    for key in keys:
        if key not in SCHEMA:
            raise ValueError(unknown_key(key) + "\n  Correct the spelling on the command line.")
    if keys and not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        raise ValueError(_no_config())


def _illegal_value(text: str) -> str:
    """absl's `flag --config.train.steps=x: reason`, with what would be accepted."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): (.*)", text, re.DOTALL)
    if not found or found[1] not in SCHEMA:
        return re.sub(r"^flag --config=.*?: (?=.*\n)", "", text)
    return f"{wrong_type(found[1], found[2])}\n  Change --config.{found[1]}."


class _ConfigParser(flags.ArgumentParser):
    """Reads the file behind --config."""

    def parse(self, argument: str) -> ConfigDict:
        try:
            return load(argument).lock()
        except (AttributeError, KeyError, TypeError) as error:
            if not (text := _refused(argument, error)):
                raise
            raise BadConfigFile(text) from error

    def flag_type(self) -> str:
        return "config file"


def _refused(path: str, error: Exception) -> str:
    """The text for a key or a value that the locked config refused, with the line of the file that sets it; "" for another error."""
    said = re.search(
        r"Key \"(\w+)\" does not exist|Could not override field '(\w+)'.*?\. (.*) is of original type", str(error), re.DOTALL
    )
    lines = [
        frame.lineno or 0
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == Path(path).resolve()
    ]
    if not said or not lines:
        return ""
    unknown, known, value = said.groups()
    keys = [
        key
        for found in re.findall(r"\bconfig\.([\w.]+)", linecache.getline(path, lines[-1]))
        if (key := re.sub(r"\bupdate$", unknown or known, found)).rpartition(".")[2] == (unknown or known)
    ]
    key = keys[0] if keys else unknown or known
    what = wrong_type(key, value) if key in SCHEMA else unknown_key(key)
    return f"{path}, line {lines[-1]}: {what}\n  Correct the file."
