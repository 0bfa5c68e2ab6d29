"""Several adapters of one base, trained one after the other: each in a run directory of its own, the base in memory once.

Each run is the one that `python -m jaxllm.train` gives with the same config and data.source. All data is prepared before the first step,
so that what cannot be trained is found before hours went into another adapter.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import command, registry, train
from jaxllm.beginning import SharedBeginning
from jaxllm.config import flatten
from jaxllm.engine.workdir import Workdir

# The one field in which the runs differ.
SOURCE = "data.source"
NAME = re.compile(r"\w[\w.-]*")


def main(data: Sequence[str]) -> int:
    """Trains an adapter for each NAME=SOURCE of `data` as --config says, in --workdir/NAME; the exit code, as `train.run`'s."""
    config, folder, asked = command.given()
    sources = parse(data)
    _check_config(config, folder)
    configs = {}
    for name, source in sources.items():
        own = config.copy_and_resolve_references()
        own.data.source = source
        configs[name] = command.resolved(own, folder / name, asked)
    with train.started() as console:
        for own in configs.values():
            train.check_here(own)
        with ExitStack() as stack:
            opened = {name: stack.enter_context(train.open_run(folder / name)) for name in configs}
            return run(configs, opened, console)


def parse(data: Sequence[str]) -> dict[str, str]:
    """Name -> source of texts NAME=SOURCE; ValueError for other texts, none, and a name that comes twice."""
    found: dict[str, str] = {}
    for text in data:
        name, _, source = text.partition("=")
        if not source or not NAME.fullmatch(name) or name in found:
            what = "has a name that came before" if name in found else "does not name an adapter and its data"
            raise ValueError(
                f"--data {text} {what}.\n  Accepted: NAME=SOURCE, as --data law=law.jsonl, with a name of its own, which becomes a"
                " directory: letters, digits, and . _ - behind the first.\n  Correct it."
            )
        found[name] = source
    if not found:
        raise ValueError(
            "no data is given.\n  Accepted: --data NAME=SOURCE for each adapter; SOURCE is what data.source may be.\n  Add --data."
        )
    return found


def _check_config(config: ConfigDict, folder: Path) -> None:
    """ValueError for what has no base that runs could share, or no directories of their own."""
    transforms = config.train.transforms
    adapts = any(registry.resolve("transform", name)(config).adapts for name in transforms)
    if not (config.train.start and adapts):
        wrong = f"train.transforms = {transforms!r}" if config.train.start else "train.start = ''"
        raise ValueError(
            f"{wrong}: no adapter beside a model.\n  Accepted: the model to begin with in train.start, and lora or dora in"
            " train.transforms.\n  Set both, or train whole models, one at a time, with python -m jaxllm.train."
        )
    if config.data.dir:
        raise ValueError(
            f"data.dir = '{config.data.dir}' is one directory for the data of several adapters.\n"
            "  Accepted: '', which prepares the data of each in its own run directory.\n  Leave out data.dir."
        )
    if Workdir(folder).config.exists():
        raise ValueError(
            f"--workdir {folder} is a run.\n  Accepted: a directory for the runs, one an adapter.\n  Give another --workdir."
        )


def run(configs: Mapping[str, ConfigDict], opened: Mapping[str, Workdir], console: Console) -> int:
    """Trains in open run directories; the exit code: 0, or 128 + the signal that ended the series early.

    ValueError for data that needs other parameters or another tokenizer than that of the first.
    """
    say = partial(console.print, markup=False, highlight=False)
    ready = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        say(f"{name} ({number} of {len(configs)}): {config.data.source}")
        ready[name] = train.get_ready(config, opened[name], say)
    _check_alike(ready)
    beginning = SharedBeginning(any(each.newest is None for each in ready.values()))
    for number, (name, config) in enumerate(configs.items(), 1):
        say(f"\n{name} ({number} of {len(configs)}) in {opened[name].path}")
        code = train.run(config, opened[name], console, beginning)
        if code:
            return code
        if beginning.stopped and number < len(configs):
            ended = f"{beginning.stopped.name} after {number} of {len(configs)} adapters"
            say(f"{ended}: all of them are saved. To go on, run the same command again:\n  {train.same_command()}")
            return 128 + beginning.stopped
    return 0


def _check_alike(ready: Mapping[str, train.Ready]) -> None:
    first, *others = ready
    fields = {name: _shared_fields(each) for name, each in ready.items()}
    for name in others:
        differing = [
            f"{key} = {value!r}, and {fields[name][key]!r} with '{name}'"
            for key, value in fields[first].items()
            if value != fields[name][key]
        ]
        if differing:
            raise ValueError(
                f"the adapters '{first}' and '{name}' do not fit one base. With '{first}' {'; '.join(differing)}.\n"
                f"  Accepted: runs that differ in {SOURCE} alone: the same tokenizer, vocabulary and number of classes.\n"
                "  Train what differs by itself, with python -m jaxllm.train."
            )


def _shared_fields(ready: train.Ready) -> dict[str, Any]:
    """What must be the same for all runs."""
    fields = {key: value for key, value in flatten(ready.config).items() if key != SOURCE}
    return fields | {"the tokenizer": ready.prepared.record["tokenizer"]["fingerprint"][:16]}
