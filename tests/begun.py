"""Models of every kind to begin training with, and how training begins with them."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_gguf
from random_run import write_run
from rich.console import Console

from jaxllm import config as schema
from jaxllm import convert, models, runs, start
from jaxllm.data import tokenize
from jaxllm.engine import session as sessions
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.interop import directory, peft, peft_params
from jaxllm.parallel import plan as plans
from jaxllm.transforms import adapt, tree

BYTES = 259  # tokens of the byte tokenizer
NEW = 30  # the step at which the runs below have weights of their own


def save(run: Path, params: Any, frozen: Any = None) -> None:
    """A checkpoint of these weights at step NEW."""
    checkpoints = Checkpoints(run / "checkpoints", keep_last=9)
    checkpoints.save(NEW, {"params": params} if frozen is None else {"params": params, "frozen": frozen})
    checkpoints.close()


def write_sources(folder: Path) -> dict[str, Path]:
    """A run in each form of the stack, one with adapters, and the first one and a LLaMA as others write them."""
    found = {
        "unrolled": write_run(folder / "unrolled", model__name="llama", model__layers_as="unrolled"),
        "scan": write_run(folder / "scan", model__layers_as="scan"),
        "adapted": write_run(folder / "adapted", train__transforms=("dora",), lora__rank=2, train__trainable=".*/(a|b|magnitude)"),
    }
    adapted = runs.load(found["adapted"])
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), adapted.params)
    save(found["adapted"], *tree.split(drawn, adapt.adapters(adapted.model.axes)))
    assert convert.convert(found["unrolled"], folder / "hf", "", None, Console(file=io.StringIO())) == 0
    values = tiny_gguf.model_values() | tiny_gguf.tokenizer_values()
    tensors = tiny_gguf.stored(tiny_gguf.tensors(np.random.default_rng(5)))
    found |= {"hf": folder / "hf", "gguf": tiny_gguf.write(folder / "tiny.gguf", tensors, values)}
    for name in ("unrolled", "hf"):
        found[f"peft_{name}"] = write_adapter(folder / f"peft_{name}", found[name])
    return found


def write_adapter(path: Path, base: Path, new: tuple[str, ...] = ()) -> Path:
    """An adapter of PEFT that changes the base, which it names. new: its tokens above the base's, with which its tokenizer is written."""
    run, rng = runs.load(base), np.random.default_rng(1)
    config = run.config.copy_and_resolve_references()
    config.train.transforms, config.lora.rank, config.model.start_rows = ("lora",), 2, config.model.vocab_size
    config.model.vocab_size += len(new)
    adapted, more = models.build(config), [(0, len(new)), (0, 0)]
    params = {
        **run.params,
        **{part: jax.tree.map(lambda table: jnp.pad(table, more), run.params[part]) for part in ("embed", "head")},
    }
    drawn = adapt.Adaptation(run.model.axes, adapted.config.transforms).params(params, jax.random.key(0))
    moved = adapt.adapters(adapted.axes)

    def move(path: Any, array: jax.Array) -> jax.Array:
        return array + rng.normal(0, 0.1, array.shape).astype(np.float32) if tree.path_name(path) in moved else array

    peft.write(path, peft_params.export(jax.tree.map_with_path(move, drawn), adapted.config, base=str(base)))
    if new:
        tokenizer = tokenize.extend(run.tokenizer, new, None)
        for name, data in directory.tokenizer_alone(tokenizer, adapted.config).files.items():
            (path / name).write_bytes(data)
    return path


def config_of(path: Path | str, **fields: Any) -> Any:
    """Keys with __ for the dot."""
    config = schema.base()
    config.train.start, config.train.batch_seqs, config.parallel.data = str(path), 4, 1
    for key, value in fields.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def begin(config: Any, workdir: Path) -> tuple[Any, Any, str]:
    """(session, params, what was said), as training does it."""
    resolved = start.resolve(config, workdir)
    schema.check(resolved)
    vocab_size = start.open_start(config.train.start).config.model.vocab_size
    resolved = schema.with_vocabulary(resolved, vocab_size)
    session = sessions.build_session(resolved, plans.make(resolved, jax.devices()[:1]))
    said: list[str] = []
    return session, start.load(session, said.append), "".join(said)


def equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))
