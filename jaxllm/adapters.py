"""Adapters: what there is, training several, files for PEFT, and averages.

  python -m jaxllm.adapters list PATH ...
  python -m jaxllm.adapters train --config FILE [--config.a.b=value ...] --data NAME=SOURCE --data NAME=SOURCE ... [--workdir DIR]
  python -m jaxllm.adapters export --run RUN --to DIR [--step N] [--base PATH]
  python -m jaxllm.adapters average --from DIR --from DIR ... --to DIR [--weights 0.5,0.5] [--rank R]

PATH is an adapter (a run that trained one, or a directory with adapter_config.json), or a directory of such. train trains one on each
SOURCE, a data.source, in the run directory DIR/NAME, with the base in memory once; the same command goes on where it was. export writes
the adapter of a run as PEFT does, and the tokenizer beside it if it is not the base's or has a chat template; --base is the model that
the run began with, where its config does not say it. average adds up what the adapters of PEFT add to the weights, times their weights:
exactly, with the sum of their ranks, or as well as rank R can. `Adapters` holds several beside one base.
"""

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jaxllm import command, models, runs, series, start
from jaxllm import config as schema
from jaxllm.consistency import ADAPTERS
from jaxllm.data import tokenize
from jaxllm.engine import state
from jaxllm.engine.workdir import Workdir, check_space, sync_directory
from jaxllm.interop import directory as hf
from jaxllm.interop import peft, peft_average, peft_params, peft_tokenizer
from jaxllm.transforms import adapt, grown, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Params

ACTIONS = ("list", "train", "export", "average")
ITEM_BYTES = 4
# Relative error of numbers that are stored in float32.
ROUNDING = float(np.finfo(np.float32).eps)
LISTED = f"a run whose train.transforms has lora or dora, a directory with {peft.CONFIG}, or a directory of these"


class Adapters:
    """Several adapters beside one base, one of which is used at a time. The base is in memory once."""

    def __init__(self, base: runs.Run) -> None:
        self._runs: dict[str | None, runs.Run] = {None: base}

    def add(self, name: str, path: str | Path) -> None:
        """Reads an adapter of PEFT. ValueError if it does not fit the base, or for a name that is taken."""
        if name in self._runs:
            raise ValueError(
                f"an adapter '{name}' is there already.\n  Accepted: a name other than {', '.join(self.names())}.\n  Give another name."
            )
        self._runs[name] = runs.beside(self._runs[None], peft.read(path), self._runs.values())

    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they were added."""
        return tuple(name for name in self._runs if name is not None)

    def use(self, name: str | None) -> runs.Run:
        """The base with this adapter, with its tokenizer if it has one; or with None the base alone. Nothing is copied.

        `model` is one object for all of which one compiled program does, which is for all but those with new tokens or a head of
        their own.
        """
        if name not in self._runs:
            raise ValueError(
                f"no adapter '{name}'.\n  Accepted: {', '.join(self.names()) or 'none was added'}, or None for the base alone.\n"
                "  Add it first, or correct the name."
            )
        return self._runs[name]


def define_flags() -> None:
    # The action comes before the flags.
    flags.FLAGS.set_gnu_getopt(True)
    command.define_flags()
    flags.DEFINE_multi_string("data", [], "train: NAME=SOURCE, once for each adapter; its run directory is NAME in --workdir")
    flags.DEFINE_string("run", "", "export: run directory that trained an adapter")
    flags.DEFINE_integer("step", None, "export: checkpoint to use; default: the newest")
    flags.DEFINE_string("base", "", "export: the model that the run began with; default: its train.start")
    flags.DEFINE_string("to", "", "export, average: directory to write, which must not exist or be empty")
    flags.DEFINE_multi_string("from", [], "average: directories with adapter_config.json, two or more")
    flags.DEFINE_list("weights", None, "average: of each adapter, in the order of --from; default: all the same, 1 together")
    flags.DEFINE_integer("rank", None, "average: of the result; default: the sum of the ranks, which is exact", lower_bound=1)


def main(arguments: list[str]) -> int | None:
    action, *paths = arguments or [""]
    given, console = flags.FLAGS, Console(soft_wrap=True)
    if action not in ACTIONS or bool(paths) != (action == "list"):
        unexpected = f"unexpected argument '{paths[0] if paths and action in ACTIONS else action}'"
        what = "no action is given" if not action else unexpected if action != "list" else "no path is given"
        raise ValueError(f"{what}.\n  Accepted: list PATH ..., train, export, average; see --help.\n  Begin with one of these.")
    if action == "list":
        show(find(paths), console)
        return None
    if action == "train":
        return series.main(given["data"].value or ())
    target = _target(given.to)
    if action == "export":
        console.print(export(given.run, target, given.step, given.base), markup=False, highlight=False)
    else:
        console.print(average(given["from"].value or (), target, given.weights, given.rank), markup=False, highlight=False)
    return None


class Row(NamedTuple):
    """An adapter, in words for the table of `list`. parameters: those that a run trained, those that are in files of PEFT."""

    path: str
    base: str
    kind: str
    rank: str
    alpha: str
    targets: str
    parameters: int


class Found(NamedTuple):
    """unread: path -> what is wrong there."""

    rows: list[Row]
    unread: dict[str, Exception]

    @property
    def reasons(self) -> list[str]:
        """A line for each of `unread`."""
        lines = {path: str(error).partition("\n")[0] for path, error in self.unread.items()}
        return [line if path in line else f"{path}: {line}" for path, line in lines.items()]


def find(paths: Sequence[str | Path]) -> Found:
    """The adapters at these paths, or in the directories there; ValueError, or what is wrong with the only one, if none can be read."""
    found = Found([], {})
    for path in (Path(path).expanduser() for path in paths):
        if not _find(path, found):
            found.unread[str(path)] = ValueError(
                f"'{path}' {'is no adapter, and has none in it' if path.exists() else 'does not exist'}.\n  Accepted: {LISTED}.\n"
                "  Correct the path."
            )
    if found.rows:
        return found
    if len(found.unread) == 1:
        raise next(iter(found.unread.values()))
    reasons = "".join(f"\n    {reason}" for reason in found.reasons)
    raise ValueError(
        f"there is no adapter that can be read:{reasons}\n  Accepted: {LISTED}.\n"
        "  Correct the paths, or give one of them alone, and what is wrong there is said in full."
    )


def _find(path: Path, found: Found) -> int:
    """Adds what is at this path, and in the directory there, to `found`: how many there are, read or not."""
    before = len(found.rows) + len(found.unread)
    for each in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
        try:
            row = _row(each)
        except (ValueError, ImportError, OSError) as error:
            found.unread[str(each)] = error
        else:
            found.rows.extend([row] if row else [])
    return len(found.rows) + len(found.unread) - before


def _row(path: Path) -> Row | None:
    if peft.is_one(path):
        adapter = peft.read(path)
        kind = "dora" if adapter.dora else "lora"
        products = sorted(set(adapter.products.values()))
        return Row(
            path=str(path),
            base=adapter.base,
            kind=f"{kind}, rslora" if adapter.rslora else kind,
            rank=", ".join(dict.fromkeys(str(product.rank) for product in products)),
            alpha=", ".join(dict.fromkeys(f"{adapter.alpha(product):g}" for product in products)),
            targets=adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets),
            parameters=sum(map(math.prod, adapter.shapes.values())),
        )
    config = _config_of_run(path)
    return None if config is None else _row_of_run(Workdir(path), config)


def _config_of_run(path: Path) -> ConfigDict | None:
    """The config of a run that trained an adapter; None for anything else."""
    workdir = Workdir(path)
    if not workdir.config.is_file() or runs.is_foreign(path):
        return None
    config = schema.load(workdir.config)
    return config if any(name in ADAPTERS for name in config.train.transforms) else None


def _row_of_run(workdir: Workdir, config: ConfigDict) -> Row:
    kind = next(name for name in config.train.transforms if name in ADAPTERS)
    switches = [kind, *(["rslora"] if config.lora.rslora else []), *(["pissa"] if config.lora.init == "pissa" else [])]
    model = models.build(schema.with_vocabulary(config, tokenize.load(workdir.tokenizer).vocab_size))
    trained = state.trainable(config, model.axes)
    shapes = tree.named_leaves(jax.eval_shape(model.init, jax.random.key(0)))
    return Row(
        path=str(workdir.path),
        base=config.train.start,
        kind=", ".join(switches),
        rank=str(config.lora.rank),
        alpha=f"{config.lora.alpha:g}",
        targets=config.lora.targets,
        parameters=sum(shape.size for name, shape in shapes if name in trained),
    )


def show(found: Found, console: Console) -> None:
    """Prints the table of `list`, and below it what could not be read."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("parameters", "MB")]
    table = Table(Column("path", overflow="fold"), Column("adapter", overflow="fold"), *numbers)
    for row in found.rows:
        words = f"{row.kind}, rank {row.rank}, alpha {row.alpha}\nof {row.targets}\non {row.base or 'a base that it does not name'}"
        table.add_row(escape(row.path), escape(words), f"{row.parameters:,}", f"{row.parameters * ITEM_BYTES / 1e6:.3g}")
    console.print(table)
    console.print("parameters of a run: those that it trained; of files: those in them. MB: of these in float32", style="dim")
    for reason in found.reasons:
        console.print(f"not listed: {reason}", style="dim", markup=False, highlight=False)


def export(directory: str, target: Path, step: int | None = None, base: str = "") -> str:
    """Writes the adapter of a run as PEFT does, and returns what there is to say about it.

    ValueError for a run without an adapter, one whose kernels were trained themselves, and one begun by PiSSA without its base, or
    whose kernels were then quantized.
    """
    run, _ = runs.without_value(runs.load(directory, step))
    config, axes = run.config, run.model.axes
    imported = run.imported is not None or peft.is_one(directory)
    if imported or not adapt.adapters(axes):
        raise ValueError(
            f"'{directory}' {'is no run' if imported else 'trained no adapter'}.\n"
            "  Accepted: a run whose train.transforms has lora or dora.\n  Name such a run (whole models: python -m jaxllm.convert)."
        )
    whole = state.trainable(config, axes) - adapt.adapters(axes)
    if kernels := sorted(name for name in whole if name.endswith("/base") and name.removesuffix("/base") not in grown.TABLES):
        raise ValueError(
            f"'{directory}' trained {', '.join(kernels[:4])}, which have adapters beside them.\n"
            "  Accepted: runs that leave the kernels as they were, as train.trainable = 'auto' does.\n"
            "  Write the merged weights (python -m jaxllm.convert)."
        )
    rounded, pissa = _rounded(run.params), config.lora.init == "pissa"
    if rounded and pissa:
        raise ValueError(
            f"'{directory}' began with PiSSA, and quantized what that left of {', '.join(rounded[:4])}: what the model lost by it is no"
            " product of two thin matrices, which a file of PEFT could hold.\n"
            "  Accepted: runs of PiSSA whose train.transforms quantize no kernel that has an adapter.\n"
            "  Write the merged weights (python -m jaxllm.convert)."
        )
    base = base or config.train.start
    original = _original(base, directory) if pissa else None
    options = {"whole": whole, "base": base, "rslora": config.lora.rslora, "original": original}
    adapter = peft_params.export(run.params, run.model.config, **options)
    there = bool(base) and Path(base).expanduser().exists()
    tokenizer = peft_tokenizer.make(run.tokenizer, start.open_start(base).tokenizer if there else None, run.model.config)
    lines = [f"{directory}, step {run.step}", *_write(target, adapter, tokenizer.files), *_growth(config, axes)]
    notes = [*tokenizer.notes, *_notes(base)]
    if rounded:
        notes.append(
            "it was trained beside quantized kernels, and PEFT puts it beside those of the base: the models differ by what quantizing"
            " lost. python -m jaxllm.convert writes the one that was trained"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _growth(config: ConfigDict, axes: Params) -> list[str]:
    if not adapt.adapters(axes) & {f"{name}/rows" for name in grown.TABLES}:
        return []
    before, rows = config.model.start_rows, config.model.vocab_size
    return [
        f"the vocabulary grew from {before} to {rows}: in PEFT call base.resize_token_embeddings({rows}) before"
        " PeftModel.from_pretrained"
    ]


def _rounded(params: Params) -> list[str]:
    """Path names of quantized kernels that have an adapter beside them."""
    nodes = tree.named_leaves(params, is_leaf=adapt.is_adapter)
    return list(dict.fromkeys(name for name, node in nodes if adapt.is_adapter(node) and isinstance(node.base, Quantized)))


def _original(base: str, directory: str) -> Params:
    if not base or not Path(base).expanduser().exists():
        named = f" '{base}'" if base else ""
        raise ValueError(
            f"'{directory}' began with PiSSA, which took a part of each kernel away, and its base{named} is not here.\n"
            "  Accepted: the model that the run began with.\n  Give it as --base PATH."
        )
    return adapt.merged(runs.load(base).params)


def _notes(base: str) -> list[str]:
    if not base:
        return ["the file names no base; give --base PATH"]
    if not hf.is_one(Path(base).expanduser()) and Path(base).expanduser().exists():
        command = f"python -m jaxllm.convert --from {shlex.quote(base)} --to DIR --format hf"
        return [f"PEFT opens a base that transformers opens: {command}"]
    return []


def average(paths: Sequence[str], target: Path, weights: Sequence[str] | None = None, rank: int | None = None) -> str:
    """Writes the average of adapters of PEFT as one, and returns what there is to say about it; ValueError for what has no average."""
    numbers = _numbers(weights, len(paths))
    adapters = [_exported(path) for path in paths]
    averaged = peft_average.average(adapters, numbers, rank)
    lines = [f"{number:g} * {path}" for number, path in zip(numbers, paths, strict=True)]
    tokenizers = [peft_tokenizer.files(Path(path).expanduser()) for path in paths]
    alike = all(files == tokenizers[0] for files in tokenizers)
    lines += _write(target, averaged.adapter, tokenizers[0] if alike else {})
    if rank is not None:
        worst = max(averaged.errors, key=lambda module: averaged.errors[module])
        exact = averaged.errors[worst] < ROUNDING
        error = f"{averaged.error:.2e} of all, at most {averaged.errors[worst]:.2e} ({worst})"
        lines.append(f"relative error (Frobenius) of the products: {'exact up to rounding' if exact else error}")
    if len(bases := {adapter.base for adapter in adapters}) > 1:
        lines.append(
            f"note: they name different bases, {', '.join(sorted(bases))}; their average has a meaning if these are one model"
        )
    if not alike:
        lines.append("note: they have different tokenizers, or not all of them have one; none is written")
    return "\n".join(lines)


def _exported(path: str) -> peft.Adapter:
    """The adapter in a directory of PEFT; ValueError for anything else."""
    if not peft.is_one(path) and _config_of_run(Path(path).expanduser()) is not None:
        run, target = shlex.quote(str(Path(path))), shlex.quote(f"{Path(path)}_peft")
        raise ValueError(
            f"'{path}' is a run, and what is averaged are files of PEFT.\n  Accepted: directories with {peft.CONFIG}.\n"
            f"  Export it first (python -m jaxllm.adapters export --run {run} --to {target}), and average what that wrote."
        )
    return peft.read(path)


def _numbers(weights: Sequence[str] | None, count: int) -> list[float]:
    if count < 2:
        raise ValueError(f"{count} adapters to average.\n  Accepted: two or more.\n  Give --from DIR once for each.")
    try:
        numbers = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"--weights {','.join(weights or ())} for {count} adapters.\n  Accepted: {count} numbers with commas between them.\n"
            "  Correct them, or leave them out."
        )
    return numbers


def _target(given: str) -> Path:
    target = Path(given).expanduser()
    if not given or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ValueError(
            f"--to {f'{given} is there already' if given else 'is not given'}.\n"
            "  Accepted: a directory that does not exist, or an empty one.\n  Give another path."
        )
    return target


def _write(target: Path, adapter: peft.Adapter, tokenizer: Mapping[str, bytes]) -> list[str]:
    """Writes the directory, which appears when it is complete; `tokenizer`: its files, name -> bytes."""
    check_space(target, ITEM_BYTES * sum(map(math.prod, adapter.shapes.values())), what="the adapter", change="give another --to")
    partial = target.absolute().with_name(f".{target.absolute().name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written = peft.write(partial, adapter)
        for name, data in tokenizer.items():
            (partial / name).write_bytes(data)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
        sync_directory(target.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    ranks = sorted({product.rank for product in adapter.products.values()})
    return [
        f"-> {target}: {', '.join((*written.files, *tokenizer))}",
        f"{'dora' if adapter.dora else 'lora'} of rank {', '.join(map(str, ranks))} beside {len(adapter.products)} modules,"
        f" {written.parameters:,} numbers" + (f", {len(adapter.whole)} tensors stored whole" if adapter.whole else ""),
    ]


if __name__ == "__main__":
    define_flags()
    command.run(main, positional=True)
