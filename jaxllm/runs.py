"""A run directory opened for use: its config, tokenizer, model and the weights of one checkpoint."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data import tokenize
from jaxllm.engine import canonical
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.workdir import Workdir
from jaxllm.transforms import tree
from jaxllm.types import Model, Params, Tokenizer


@dataclass(frozen=True)
class Run:
    """params: averaged weights where the run keeps them, on one device. step: updates that they have seen."""

    workdir: Workdir
    config: ConfigDict
    tokenizer: Tokenizer
    model: Model
    params: Params
    step: int


def load(directory: str | Path, step: int | None = None, *, for_decoding: bool = False) -> Run:
    """The run in `directory` at checkpoint `step` (None: the newest), whatever mesh it was trained on.

    for_decoding: on a CPU, layers are unrolled and compute in float32 whatever the run did, which decodes faster there than a scan
    and than bfloat16. Else everything is as it was trained.
    ValueError for what is no run, a run without a checkpoint, and a step that is not kept, with the steps that are.
    """
    workdir = _workdir(directory)
    config = schema.load(workdir.config)
    if for_decoding and jax.default_backend() == "cpu":
        _suit_cpu(config)
    tokenizer = tokenize.load(workdir.tokenizer)
    config = schema.with_vocabulary(config, tokenizer.vocab_size)
    model = models.build(config)
    template = jax.eval_shape(model.init, jax.random.key(0))
    restored = Checkpoints(workdir.checkpoints).load_params(canonical.abstract(template), step)
    # Cut into layers on the host: on the device that is a program to compile, which takes longer than all the rest.
    params = jax.device_put(tree.unstack_like(jax.device_get(restored.tree), template))
    return Run(workdir, config, tokenizer, model, params, restored.step)


def _suit_cpu(config: ConfigDict) -> None:
    config.model.layers_as = "unrolled"
    if config.precision.compute != "float32":
        logging.info("trained in %s, computes in float32: faster on a CPU", config.precision.compute)
        config.precision.compute = "float32"


def _workdir(directory: str | Path) -> Workdir:
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
    nearby = [str(file.parent) for file in sorted(folder.glob("*/config.json"))]
    near = difflib.get_close_matches(str(path), nearby, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    listed = f", such as {', '.join(nearby[:8])}" if nearby else ""
    return (
        f"{what}.{hint}\n  Accepted: the --workdir of a training run{listed}.\n"
        f"  Correct the path (a relative one starts at '{os.getcwd()}'), or train first."
    )
