"""A model opened for use: its config, tokenizer and weights, out of a run directory, a directory of transformers or a GGUF file, or of an
adapter of PEFT beside one of these."""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data import tokenize
from jaxllm.engine import canonical, state
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.workdir import Workdir
from jaxllm.interop import directory as hf
from jaxllm.interop import gguf, peft, peft_attach, peft_tokenizer, weights
from jaxllm.interop.imported import Imported
from jaxllm.models import heads
from jaxllm.report import units
from jaxllm.transforms import adapt, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Model, Params, Tokenizer

GGUF = ".gguf"
# In a run directory: the files of the model that it was converted from.
CARRIED = "hf"


@dataclass(frozen=True)
class Run:
    """params: averaged weights where the run keeps them, on one device. step: updates that they have seen.

    classes: names of the classes of a head that classifies, by number. imported: None for a run of this package; of other models
    `workdir` is their path, and nothing is written there. Of an adapter of PEFT `workdir` is the adapter's, and so is the tokenizer if one
    is there; the rest is its base's. So is `model` unless the adapter makes it another one: its axes and `init` say nothing of adapters.
    """

    workdir: Workdir
    config: ConfigDict
    tokenizer: Tokenizer
    model: Model
    params: Params
    step: int
    classes: tuple[str, ...] = ()
    imported: Imported | None = None


def load(
    directory: str | Path, step: int | None = None, *, base: str | Path = "", for_decoding: bool = False, cache: str = ""
) -> Run:
    """The run in `directory` at checkpoint `step` (None: the newest), whatever mesh it was trained on; or the model in a directory of
    transformers (config.json and safetensors) or in a GGUF file, in float32, and where it is quantized in its codes; or an adapter of PEFT
    (adapter_config.json) beside `base`, which may be any of these ("": where `find_base` finds the one that the adapter names).

    for_decoding: on a CPU, layers are unrolled and compute in float32 whatever the run did, which decodes faster there than a scan
    and than bfloat16. Else everything is as it was trained. cache: precision.cache, if it is to be another one.
    ValueError for what is none of these, a run without a checkpoint, a step that is not kept, with the steps that are, an adapter whose
    base is not there or another one, and a base for what is no adapter.
    """
    if peft.is_one(directory):
        return _load_adapter(peft.read(directory), base, step, {"for_decoding": for_decoding, "cache": cache})
    if base:
        raise ValueError(
            f"--base {base} with '{directory}', which is no adapter.\n  Accepted: with a directory that has {peft.CONFIG}.\n"
            "  Leave out the base."
        )
    if is_foreign(directory):
        return _load_imported(read_imported(directory, step, keep_codes=True), cache)
    workdir = find(directory)
    config = schema.load(workdir.config)
    if for_decoding and jax.default_backend() == "cpu":
        _suit_cpu(config)
    config.precision.cache = cache or config.precision.cache
    tokenizer = tokenize.load(workdir.tokenizer)
    config = schema.with_vocabulary(config, tokenizer.vocab_size)
    model = models.build(config)
    template = jax.eval_shape(
        lambda rng: state.narrowed(model.init(rng), model.axes, config, state.trains(config, model.axes)), jax.random.key(0)
    )
    restored = Checkpoints(workdir.checkpoints).load_params(canonical.abstract(template), step)
    # Cut into layers on the host: on the device that is a program to compile, which takes longer than all the rest.
    params = tree.unstack_like(jax.device_get(restored.tree), template)
    params = jax.device_put(_widened(params) if for_decoding and jax.default_backend() == "cpu" else params)
    _say_size(workdir.path, params)
    return Run(workdir, config, tokenizer, model, params, restored.step, _classes(workdir, config))


def carried(workdir: Workdir) -> dict[str, bytes]:
    """The files of the model that a converted run comes from, name -> bytes; none for another run."""
    return {file.name: file.read_bytes() for file in sorted((workdir.path / CARRIED).glob("*"))}


def _classes(workdir: Workdir, config: ConfigDict) -> tuple[str, ...]:
    if workdir.provenance.is_file():
        return tuple(json.loads(workdir.provenance.read_bytes()).get("labels", ()))
    return _imported_classes(carried(workdir), config)


def _imported_classes(files: Mapping[str, bytes], config: ConfigDict) -> tuple[str, ...]:
    """Of a head that classifies: some files have labels for every model."""
    return hf.classes_of(files) if config.model.head in ("classify", "tag") else ()


def is_foreign(path: str | Path) -> bool:
    """Whether the path is a file, or a directory whose config.json is not one of a run: what `read_imported` is for."""
    path = Path(path).expanduser()
    return path.is_file() or path.suffix == GGUF or (bool(str(path)) and hf.is_one(path))


def read_imported(path: str | Path, step: int | None = None, *, keep_codes: bool = False) -> Imported:
    """The model of another tool at `path`, its weights still on disk; ValueError for anything else, and for a `step`.

    keep_codes: of a quantized directory, where a transform here has such codes; else its kernels are dense.
    """
    path = Path(path).expanduser()
    if step is not None:
        raise ValueError(
            f"step {step} of '{path}', which is no run of this package.\n  Accepted: no step, as it holds one model.\n"
            "  Leave out the step."
        )
    return hf.read(path, keep_codes=keep_codes) if path.is_dir() else gguf.read(path)


def no_tokenizer(path: Path) -> str:
    """The error text for a model without one."""
    return (
        f"'{path}' has no tokenizer.\n  Accepted: {', '.join(hf.tokenizer_files.DEFINITIONS)} beside its config.json.\n"
        "  Fetch the tokenizer files of the model."
    )


def _load_imported(imported: Imported, cache: str) -> Run:
    if imported.tokenizer is None:
        raise ValueError(no_tokenizer(imported.path))
    for note in imported.notes:
        logging.info("%s: %s", imported.path, note)
    loaded = weights.load(imported)
    if loaded.unused:
        logging.info("%s: tensors that are not used: %s", imported.path, ", ".join(loaded.unused))
    _say_size(imported.path, loaded.params)
    config, classes = imported.config, _imported_classes(imported.files, imported.config)
    config.precision.cache = cache or config.precision.cache
    return Run(Workdir(imported.path), config, imported.tokenizer, models.build(config), loaded.params, 0, classes, imported)


def _say_size(path: Path, params: Params) -> None:
    """A log line on what a quantized model takes."""
    kernels = [node for node in jax.tree.leaves(params, is_leaf=_is_quantized) if _is_quantized(node)]
    if not kernels:
        return
    weights_in_them, bits = sum(math.prod(kernel.shape) for kernel in kernels), 8 * _bytes(kernels)
    logging.info(
        "%s: kernels in %s, %.4g bits a weight; parameters take %s on the device, of which %s is not quantized",
        path,
        ", ".join(sorted({kernel.form for kernel in kernels})),
        bits / weights_in_them,
        units.size(_bytes(params)),
        units.size(_bytes(params) - bits / 8),
    )


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _widened(params: Params) -> Params:
    """Matrices that were frozen in bfloat16 in float32, to which a CPU would convert them at each token."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf, params)


def _load_adapter(adapter: peft.Adapter, base: str | Path, step: int | None, options: Mapping[str, Any]) -> Run:
    path = Path(base).expanduser() if base else find_base(adapter)
    if step is not None or path is None or not path.exists():
        raise ValueError(_no_base(adapter, str(base), step))
    run = load(path, **options)
    # What an adapter names as its base is what it was trained beside: of another adapter the merged weights.
    adapted = any(adapt.is_adapter(node) for node in jax.tree.leaves(run.params, is_leaf=adapt.is_adapter))
    return beside(merged(run) if adapted and not base else run, adapter)


def merged(run: Run) -> Run:
    """The run with adapters folded into the weights that they were trained beside (dequantized ones, where those were quantized)."""
    config = run.config.copy_and_resolve_references()
    config.train.transforms, config.train.start = (), ""
    config.train.trainable = "auto"  # a pattern may name what adapters had
    return dataclasses.replace(run, config=config, model=models.build(config), params=adapt.merged(run.params))


def without_value(run: Run) -> tuple[Run, tuple[str, ...]]:
    """(the run without its value head, the names of what that had): nothing but more training with ppo has a use for one."""
    if heads.VALUE not in run.params:
        return run, ()
    config = run.config.copy_and_resolve_references()
    config.train.objective = "sft"  # the same model, to answer with
    params = {name: part for name, part in run.params.items() if name != heads.VALUE}
    names = tuple(f"{heads.VALUE}/{name}" for name in tree.names(run.params[heads.VALUE]))
    return dataclasses.replace(run, config=config, model=models.build(config), params=params), names


def beside(base: Run, adapter: peft.Adapter, others: Iterable[Run] = ()) -> Run:
    """The base with this adapter. Its arrays are shared, not copied.

    So is its `model`, or that of one of `others`, where the adapter leaves it as it is: what is compiled for one then serves the other.
    ValueError as `peft_attach.attach` and `peft_tokenizer.choose` raise it.
    """
    (params, config), workdir = peft_attach.attach(base.params, base.config, adapter), Workdir(Path(adapter.where))
    tokenizer = peft_tokenizer.choose(workdir.path, config, base.tokenizer)
    alike = (run.model for run in (base, *others) if _functions(run.config) == _functions(config))
    model = next(alike, None) or models.build(config)
    return dataclasses.replace(base, workdir=workdir, config=config, tokenizer=tokenizer, params=params, model=model)


def _functions(config: ConfigDict) -> dict[str, Any]:
    """The fields that tell what the functions of a model compute from those of another one on the same base."""
    return {**config.model.to_dict(), "start_rows": 0}  # which says where a table is cut for training


def find_base(adapter: peft.Adapter) -> Path | None:
    """Where the base is that the adapter names: at this path from here, or from a directory that the adapter is in; None if nowhere.

    ValueError if the bases of bases come back to one that was there before.
    """
    found = base = _named_base(adapter)
    passed = [Path(adapter.where)]
    while base is not None and peft.is_one(base):
        if any(base.samefile(before) for before in passed):
            raise ValueError(
                f"'{adapter.where}' is an adapter, and its base never comes: {' -> '.join(map(str, (*passed, base)))}.\n"
                "  Accepted: adapters whose bases end with a whole model.\n"
                f"  Correct base_model_name_or_path in {peft.CONFIG} of one of these, or give the model as --base PATH (base= in Python)."
            )
        passed.append(base)
        base = _named_base(peft.read(base))
    return found


def _named_base(adapter: peft.Adapter) -> Path | None:
    own = Path(adapter.where).absolute()
    found = (place / Path(adapter.base).expanduser() for place in (Path(), *own.parents) if adapter.base)
    return next((path for path in found if path.exists() and not path.samefile(own)), None)


def _no_base(adapter: peft.Adapter, base: str, step: int | None) -> str:
    if step is not None:
        return f"step {step} of '{adapter.where}', which is no run of this package.\n  Accepted: no step.\n  Leave out the step."
    names = f"its base '{adapter.base}' is not a path here, nor beside it" if adapter.base else "it names no base"
    what = f"its base '{base}' is not a path here" if base else names
    return (
        f"'{adapter.where}' is an adapter, and {what}.\n  Accepted: the model that it was trained on: a run, a directory with config.json"
        " and model.safetensors, a .gguf file.\n  Give it as --base PATH (base= in Python)."
    )


def _suit_cpu(config: ConfigDict) -> None:
    config.model.layers_as = "unrolled"
    if config.precision.compute != "float32":
        logging.info("trained in %s, computes in float32: faster on a CPU", config.precision.compute)
        config.precision.compute = "float32"


def find(directory: str | Path) -> Workdir:
    """The paths of the run; ValueError, with the nearest run, if it has no config, and if it has no checkpoint."""
    workdir = Workdir(Path(directory).expanduser())
    if not str(directory) or not workdir.config.is_file():
        raise ValueError(_no_run(directory, workdir.path))
    if not Checkpoints(workdir.checkpoints).steps():
        raise ValueError(
            f"the run '{workdir.path}' has no checkpoint yet.\n  Accepted: a run that has saved one; the config saves every"
            " checkpoint.every_steps steps, at the end and on Ctrl-C.\n  Train longer, or name another run."
        )
    return workdir


def _no_run(directory: str | Path, path: Path) -> str:
    if not str(directory):
        what, folder = "no run is given", Path("runs")
    elif path.is_dir():
        what, folder = f"no run in '{path}': it has no config.json", path
    else:
        what, folder = f"no run in '{path}': it does not exist", path.parent
    others = (file.parent for file in sorted(folder.glob("*/config.json")))
    nearby = [str(other) for other in others if Checkpoints(Workdir(other).checkpoints).steps() or hf.is_one(other)]
    near = difflib.get_close_matches(str(path), nearby, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    more = f" and {len(nearby) - 8} more" if len(nearby) > 8 else ""
    listed = f", such as {', '.join(nearby[:8])}{more}" if nearby else ""
    return (
        f"{what}.{hint}\n  Accepted: the --workdir of a training run{listed}; a directory with config.json and model.safetensors; a .gguf"
        " file.\n"
        f"  Correct the path (a relative one starts at '{os.getcwd()}'), or train first."
    )
