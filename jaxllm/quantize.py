"""Compresses a model: its kernels in 8, 4 or 3 bits, as a run or in the files of other tools, with a report of what that cost.

  python -m jaxllm.quantize --model SRC --to DST [--method gptq] [--bits 4] [--group 128] [--nosymmetric] [--order static]
                            [--calibrate SOURCE] [--rows 128] [--tokens 512] [--seed 0] [--evaluate SOURCE]
                            [--format jaxllm|compressed-tensors|gptq|gptq_v2|awq|bitsandbytes] [--dtype float16] [--check] [--force]

SRC is a run directory, a directory of transformers, a GGUF file, or an adapter of PEFT beside its base; adapters are folded in. Methods:
nearest (each weight to the nearest code), clip (of ranges that are clipped to fit), gptq, awq, awq+gptq, smoothquant (int8 kernels that
round what they multiply), nf4. All but nearest and nf4 are fitted to --calibrate: a text, anything that data.source may be, or
`samples` for what the model writes itself. --evaluate measures the model before and after on another text. Nothing but DST is written:
the model, and compression.json and compression.png beside it.
"""

import contextlib
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxllm import command, convert, evaluate, logits, models, runs
from jaxllm.compression import calibration, gptq, methods, report, walk
from jaxllm.compression.calibration import Calibration
from jaxllm.compression.methods import METHODS, Recipe
from jaxllm.compression.report import KernelError, Report
from jaxllm.convert import Source
from jaxllm.decode import generate
from jaxllm.engine import compilation
from jaxllm.engine.environment import versions
from jaxllm.engine.workdir import Workdir, check_space, sync_directory
from jaxllm.interop import weights
from jaxllm.ops import sampling
from jaxllm.transforms import tree
from jaxllm.transforms.affine import Grid
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Model, Params

RUN = "jaxllm"
# --format -> of interop/packed, by whether activations are rounded, too.
PACKINGS = {
    "compressed-tensors": ("pack-quantized", "int-quantized"),
    "gptq": ("gptq",),
    "gptq_v2": ("gptq_v2",),
    "awq": ("awq",),
    "bitsandbytes": ("nf4",),
}
# Need no data.
DATALESS = ("nearest", "nf4")
SPEED_TOKENS, SPEED_ROUNDS = 64, 5


def define_flags() -> None:
    flags.DEFINE_string("model", "", "run directory, directory of transformers, GGUF file, or adapter of PEFT")
    flags.DEFINE_integer("step", None, "checkpoint of a run to use; default: the newest")
    flags.DEFINE_string("base", "", "of an adapter: the model that it stands beside; default: the path that the adapter names")
    flags.DEFINE_string("to", "", "directory to write, which must not exist or be empty")
    flags.DEFINE_enum("method", "gptq", list(METHODS), "how codes are found")
    flags.DEFINE_enum("bits", "4", ["8", "4", "3"], "of a code")
    flags.DEFINE_integer("group", None, "inputs that share a scale, 0 for all; default: 128, of smoothquant all", lower_bound=0)
    flags.DEFINE_bool("symmetric", True, "codes reach as far below 0 as above; --nosymmetric: groups have zeros of their own")
    flags.DEFINE_enum(
        "order", "static", list(gptq.ORDERS), "of gptq: none; static, the largest inputs first; group, and they share scales"
    )
    flags.DEFINE_float("damp", 0.01, "of gptq: added to the Hessian's diagonal, as a share of its mean", lower_bound=0)
    flags.DEFINE_string("targets", ".*layers/.*/kernel", "regular expression over parameter paths: the kernels to compress")
    flags.DEFINE_string(
        "calibrate", "", f"to fit to: a file, a folder, a glob, hf:OWNER/NAME, prepared data; or {calibration.SAMPLES}"
    )
    flags.DEFINE_integer("rows", 128, "of --calibrate", lower_bound=1)
    flags.DEFINE_integer("tokens", 512, "a row of --calibrate; at most the context", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "which rows, and what is sampled", lower_bound=0)
    flags.DEFINE_string("evaluate", "", "text on which the model is measured before and after")
    flags.DEFINE_enum("format", RUN, [RUN, *PACKINGS], "of what is written: a run of this package, or a directory for other tools")
    flags.DEFINE_enum(
        "dtype", "float16", ["float32", "bfloat16", "float16"], "of the scales, and in files of what is not compressed"
    )
    flags.DEFINE_bool("check", False, "reload what was written and compare its logits; exit code 2 if they differ")
    flags.DEFINE_bool("force", False, "write what no other tool is known to load, too")


class Options(NamedTuple):
    """Beside the recipe. Paths and sources as they were given."""

    source: Path
    target: Path
    step: int | None
    base: str
    targets: str
    calibrate: str
    rows: int
    tokens: int
    seed: int
    evaluate: str
    format: str
    dtype: str
    check: bool
    force: bool


def main(arguments: list[str]) -> int:
    del arguments
    given = flags.FLAGS
    if not given.model or not given.to:
        raise ValueError(
            f"--{'to' if given.model else 'model'} is not given.\n  Accepted: --model SRC --to DST.\n  Give both; see --help."
        )
    names = ("step", "base", "targets", "calibrate", "rows", "tokens", "seed", "evaluate", "format", "dtype", "check", "force")
    chosen: dict[str, Any] = {name: given[name].value for name in names}
    options = Options(Path(given.model).expanduser(), Path(given.to).expanduser(), **chosen)
    compilation.use_cache()
    return quantize(read_recipe(options), options, Console(soft_wrap=True))


def read_recipe(options: Options) -> Recipe:
    """The recipe that the flags describe; ValueError for flags that do not go together."""
    given = flags.FLAGS
    method, bits, group = given.method, int(given.bits), given.group
    if method == "smoothquant":
        if (given["bits"].present and bits != 8) or group or not given.symmetric:
            raise ValueError(
                "--method smoothquant with other codes than 8 bits with one symmetric scale an output.\n  Accepted: --bits 8 --group 0,"
                " which need not be given.\n  Leave out --bits, --group and --nosymmetric."
            )
        bits, group = 8, 0
    if method not in DATALESS and not options.calibrate:
        raise ValueError(
            f"--method {method} without --calibrate, and it is fitted to data.\n  Accepted: a text such as the model was trained on;"
            f" {calibration.SAMPLES}; --method nearest, which needs none.\n  Add --calibrate SOURCE."
        )
    order = given.order if "gptq" in method else "static"
    group = 128 if group is None else group
    if options.format != RUN and method == "nf4" and options.format != "bitsandbytes":
        raise ValueError(f"--format {options.format} with --method nf4.\n  Accepted: bitsandbytes, {RUN}.\n  Change one of them.")
    grid = Grid(bits, group, given.symmetric, order == "group" and bool(group), options.dtype)
    return Recipe(method, grid, order, given.damp)


def quantize(recipe: Recipe, options: Options, console: Console) -> int:
    """Compresses, writes and reports; the exit code, which only --check makes other than 0. ValueError for what cannot be done."""
    convert.check_free(options.target, options.format)
    source = convert.open_source(options.source, options.step, convert.HF, options.base)
    run = _run(source, options.source)
    kernels = _kernels(run, options.targets)
    config = _config(run.config, recipe, options.targets)
    model = models.build(config)
    _check_groups(model)
    calibrated = _calibrate(run, options, console) if options.calibrate else None
    before, bytes_before = _measure(run, options.evaluate), _bytes(run.params)
    began = time.perf_counter()
    # The dense layers are nobody else's from here on, and go one by one; but for a model whose speed is to be compared.
    params, dense = jax.tree.map(lambda leaf: leaf, run.params), run if options.evaluate else None
    source, run = dataclasses.replace(source, params={}), dataclasses.replace(run, params={})
    params, errors = _compress(run, params, recipe, kernels, calibrated, console)
    secs = time.perf_counter() - began
    after = dataclasses.replace(run, config=config, model=model, params=params)
    speed_before, speed_after = _speeds(dense, after) if dense else ({}, {})
    del dense
    found = Report(
        model=source.title,
        what=words(recipe),
        calibration=calibrated.what if calibrated else "",
        kernels=errors,
        bytes_before=bytes_before,
        bytes_after=_bytes(params),
        before=before | speed_before,
        after=_measure(after, options.evaluate) | speed_after,
        versions=versions(),
    )
    result = dataclasses.replace(source, config=config, params=params)
    rows = _write(result, options, found)
    report.show(found, console)
    convert.show({"to": f"{options.target} ({options.format})", "seconds of compression": f"{secs:.1f}", **rows}, console)
    return _check(after, options, console) if options.check else 0


def _check_groups(model: Model) -> None:
    """ValueError, before any work, for groups that do not cut these kernels."""
    try:
        jax.eval_shape(model.init, jax.random.key(0))
    except ValueError as error:
        # The config's fields are flags here.
        raise ValueError(str(error).replace("quant.group", "--group").replace("quant.targets", "--targets")) from error


def words(recipe: Recipe) -> str:
    """The recipe for a reader."""
    what, grid = METHODS[recipe.method], recipe.grid
    if recipe.method == "nf4":
        return what
    group = f"groups of {grid.group}" if grid.group else "a scale an output"
    order = f", order {recipe.order}" if "gptq" in recipe.method else ""
    return f"{what}, {grid.bits} bits, {group}, {'symmetric' if grid.symmetric else 'with zeros'}{order}"


def _run(source: Source, path: Path) -> runs.Run:
    """The model; ValueError for one without a tokenizer."""
    if source.tokenizer is None:
        raise ValueError(runs.no_tokenizer(path))
    imported = runs.read_imported(path) if runs.is_foreign(path) else None
    model = models.build(source.config)
    return runs.Run(Workdir(path), source.config, source.tokenizer, model, source.params, 0, source.classes, imported)


def _calibrate(run: runs.Run, options: Options, console: Console) -> Calibration:
    with _bar("row to calibrate on", console) as tell:
        return calibration.make(run, options.calibrate, options.rows, options.tokens, options.seed, tell)


@contextlib.contextmanager
def _bar(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, and tell(done, of) that moves it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def _compress(
    run: runs.Run, params: Params, recipe: Recipe, kernels: set[str], calibrated: Calibration | None, console: Console
) -> tuple[Params, list[KernelError]]:
    """(`params` with these kernels compressed in place, their errors). Without data kernel by kernel, and no errors."""
    errors: list[KernelError] = []
    if calibrated is None:
        return methods.without_data(recipe, run.model, params, kernels), errors
    with _bar("layer", console) as tell:
        compress = methods.make(recipe, run.model.config, kernels, errors)
        params = walk.walk(run.model, params, calibrated.batches, compress, tell)
    return params, errors


def _kernels(run: runs.Run, targets: str) -> set[str]:
    """Names of the kernels to compress; ValueError for a pattern that selects none, or something else."""
    every = {name for name in tree.names(run.model.axes) if name.endswith("/kernel") and "layers" in name.split("/")}
    found = {name for name in tree.names(run.model.axes) if re.fullmatch(targets, name)}
    if not found or found - every:
        what = f"selects {', '.join(sorted(found - every)[:4])}" if found else "selects nothing"
        raise ValueError(
            f"--targets '{targets}' {what}.\n  Accepted: a regular expression that matches whole names among {', '.join(sorted(every))}.\n"
            "  Change the pattern."
        )
    return found


def _config(config: ConfigDict, recipe: Recipe, targets: str) -> ConfigDict:
    """That of the compressed model: its transforms make the same tree."""
    config, grid = config.copy_and_resolve_references(), recipe.grid
    config.train.transforms = ("nf4",) if recipe.method == "nf4" else (f"int{grid.bits}",)
    config.quant.targets = targets
    config.quant.double = recipe.double
    config.quant.group = grid.group or -1
    config.quant.update({"symmetric": grid.symmetric, "ordered": grid.ordered, "scale_dtype": grid.scale_dtype})
    config.quant.activations = "int8" if recipe.method == "smoothquant" else "float"
    return config


def _measure(run: runs.Run, source: str) -> dict[str, Any]:
    """The row of `evaluate`; nothing without a text."""
    return evaluate.evaluate_source(run, source) if source else {}


def _speeds(*compared: runs.Run) -> list[dict[str, float]]:
    """Of each model the tokens a second of one row, compiled before: medians, taken in turns, so that what else the machine does
    slows all of them."""
    run = compared[0]
    tokenizer = run.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if run.model.decode is None or run.model.encode is not None or first is None:
        return [{} for _ in compared]
    count = min(SPEED_TOKENS, run.config.model.context_tokens - 1)

    def write(run: runs.Run) -> float:
        began = time.perf_counter()
        settings = sampling.Settings(temperature=0.0)
        generate.generate(
            run.model, run.params, [[first]], settings, max_new_tokens=count, stop_ids=(), vocab_size=tokenizer.vocab_size, seed=0
        )
        return time.perf_counter() - began

    _, *rounds = [[write(run) for run in compared] for _ in range(1 + SPEED_ROUNDS)]
    return [{"tokens_per_sec": count / statistics.median(secs)} for secs in zip(*rounds, strict=True)]


def _bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _write(source: Source, options: Options, found: Report) -> dict[str, str]:
    """Writes the directory, which appears when it is complete, and returns what there is to say about it."""
    target = options.target
    check_space(target, found.bytes_after, what="the model", change="give another --to")
    partial = target.absolute().with_name(f".{target.absolute().name}.quantizing")
    convert.remove(partial)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if options.format == RUN:
            # Checkpoints hold stacked layers.
            stacked = dataclasses.replace(source, params=tree.stack_layers(source.params))
            rows = convert.write_run(partial, target, stacked)
        else:
            packing = PACKINGS[options.format][-1 if source.config.quant.activations == "int8" else 0]
            rows = convert.write_hf(partial, source, options.dtype, packing=packing, forced=options.force)
        found.save(partial)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
        sync_directory(target.absolute().parent)
    finally:
        convert.remove(partial)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {**rows, "bytes on disk": f"{size:,}"}


def _check(run: runs.Run, options: Options, console: Console) -> int:
    """Prints the largest difference of the logits of what was written; 0, or 2 if it is too large."""
    params = run.params
    if options.format != RUN:
        # What is not compressed is rounded in files.
        params = jax.tree.map(partial(_stored, options.dtype), params, is_leaf=lambda node: isinstance(node, Quantized))
    expected = logits.of(run.config, params)
    if options.format == RUN:
        again = runs.load(options.target)
        found = logits.of(again.config, again.params)
    else:
        imported = runs.read_imported(options.target, keep_codes=True)
        imported.config.model.layers_as = run.config.model.layers_as
        found = logits.of(imported.config, weights.load(imported).params)
    difference, largest = logits.largest_difference(found, expected), float(abs(expected).max())
    good = difference <= convert.TOLERANCE * largest
    console.print(
        f"check: largest difference of logits {difference:.3g}; the largest logit is {largest:.3g}:"
        f" {'ok' if good else f'TOO LARGE, up to {convert.TOLERANCE * largest:.3g} is accepted'}",
        highlight=False,
    )
    return 0 if good else command.FAILED


def _stored(dtype: str, node: Any) -> Any:
    return node if isinstance(node, Quantized) else node.astype(dtype).astype(node.dtype)


if __name__ == "__main__":
    define_flags()
    command.run(main)
