"""One model on one mesh beside the same model on one device: loss, metrics and gradients of one step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import config as configs
from jaxllm import models, registry
from jaxllm.engine import gradients, state
from jaxllm.parallel import plan as plans
from jaxllm.parallel import rules
from jaxllm.parallel.region import Region
from jaxllm.transforms import tree
from jaxllm.transforms.affine import Affine

VOCAB, ROWS, LENGTH, INPUTS = 64, 16, 32, 16
OBJECTIVES = {"gpt": "causal_lm", "llama": "causal_lm", "bert": "masked_lm", "t5": "span_corruption", "transformer": "seq2seq"}
SHAPE = {
    "model.layers": 4,
    "model.width": 32,
    "model.heads": 4,
    "model.mlp_width": 64,
    "model.vocab_size": VOCAB,
    "model.context_tokens": LENGTH,
    "model.init_std": 0.1,
    "train.batch_seqs": ROWS,
    "train.loss_chunk_tokens": 64,
    "parallel.data": 1,
}


def config_of(family: str, **overrides: Any) -> Any:
    """A config of a few thousand parameters; keys of `overrides` have __ for the dot."""
    config = configs.base()
    own = {"model.name": family, "train.objective": OBJECTIVES[family]}
    if family == "llama":
        own["model.kv_heads"] = 2
    for key, value in (SHAPE | own | {key.replace("__", "."): value for key, value in overrides.items()}).items():
        section, _, name = key.rpartition(".")
        config[section][name] = value
    configs.check(config)
    return config


def batch_of(family: str, rows: int = ROWS, tokens: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row and padding, of other lengths in each row; weights differ; one row has nothing to learn."""
    rng = np.random.default_rng(seed)

    def documents(length: int, prefix: str) -> dict[str, np.ndarray]:
        place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        ends, first = rng.integers(length // 2, length + 1, (rows, 1)), rng.integers(1, length // 2, (rows, 1))
        segments = np.where(place >= ends, 0, np.where(place >= first, 2, 1)).astype(np.int32)
        positions = np.where(place >= first, place - first, place).astype(np.int32)
        return {f"{prefix}segments": segments, f"{prefix}positions": positions}

    batch = {name: rng.integers(0, VOCAB, (rows, tokens), dtype=np.int32) for name in ("tokens", "targets")}
    batch |= documents(tokens, "")
    weights = (batch["segments"] > 0) * rng.choice([0.0, 0.5, 1.0], (rows, tokens), p=[0.2, 0.2, 0.6])
    weights[3] = 0
    batch["weights"] = weights.astype(np.float32)
    if family in ("t5", "transformer"):
        batch |= {"inputs": rng.integers(0, VOCAB, (rows, INPUTS), dtype=np.int32)} | documents(INPUTS, "input_")
    if family == "bert":
        batch["token_types"] = rng.integers(0, 2, (rows, tokens), dtype=np.int32)
    return batch


def make(config: Any) -> tuple[Any, Any, Any, Any]:
    """(plan, region, model, gradients) of a config, on as many pretend devices as its mesh has."""
    plan = plans.make(config, jax.devices()[: math.prod(config.parallel[axis] for axis in rules.MESH_AXES)])
    model = models.build(config, plan.constrain)
    objective = registry.resolve("objective", config.train.objective)(model, config)
    region = Region(plan, model.axes, tuple(each.path for each in model.stacks))
    return plan, region, model, gradients.make(objective, model, config, region)


def place(plan: Any, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The batch on the mesh, its rows in the plan's order."""
    return jax.device_put({name: plan.in_order(array) for name, array in batch.items()}, plan.batch_sharding())


def parameters(model: Any, seed: int = 0) -> Any:
    """The same numbers for every mesh and both forms of the stack, on the host: no bias is zero, no scale is one."""
    like = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path: Any, like: Any) -> Any:
        if isinstance(like, Affine):
            return _grid(rng, like)
        if like.dtype == np.uint8:  # codes of quantized kernels
            return rng.integers(0, 256, like.shape, np.uint8)
        middle = 1.0 if tree.path_name(path).endswith("scale") else 0.0
        return rng.normal(middle, 0.1, like.shape).astype(np.float32)

    stacked = jax.eval_shape(tree.stack_layers, like)
    return tree.unstack_like(jax.tree.map_with_path(draw, stacked, is_leaf=lambda node: isinstance(node, Affine)), like)


def _grid(rng: np.random.Generator, like: Affine) -> Affine:
    """Codes of weights from -0.2 to 0.2, about."""
    scale = (rng.uniform(0.5, 1, like.scale.shape) * 0.4 / 2**like.bits).astype(like.scale.dtype)
    zero, groups, middle = like.zero, like.groups, 2 ** (like.bits - 1)
    if zero is not None:
        zero = rng.integers(middle - 2, middle + 2, zero.shape, np.uint8)
    if groups is not None:
        groups = rng.integers(0, like.scale.shape[like.axis], groups.shape, np.int32)
    return dataclasses.replace(like, codes=rng.integers(0, 256, like.codes.shape, np.uint8), scale=scale, zero=zero, groups=groups)


def start(config: Any, plan: Any, model: Any) -> state.TrainState:
    """A training state with these parameters on the mesh, and without an optimizer's, which no gradient looks at."""
    params = parameters(model)
    placed = jax.device_put(params, plan.shardings(model.axes, params))
    trained, frozen = tree.split_by(placed, state.trains(config, model.axes))
    zero = jnp.int32(0)
    return state.TrainState(zero, trained, frozen, None, None, None, zero, zero)


def run(config: Any, batch: dict[str, np.ndarray], rng: jax.Array | None = None) -> Any:
    """engine.gradients.Sums of one batch and those parameters, on the host, layers stacked."""
    plan, _, model, found = make(config)
    sums = jax.device_get(jax.jit(found)(start(config, plan, model), place(plan, batch), rng))
    return sums._replace(gradients=jax.device_get(tree.stack_layers(sums.gradients)))


def deviations(found: Any, expected: Any) -> dict[str, float]:
    """Relative deviation of the loss, and of each array of gradients relative to its largest entry.

    But keys have a bias without any effect on softmax, whose gradient is rounding: it is measured by that of the queries.
    """
    result = {"loss": float(abs(found.mean.total - expected.mean.total) / abs(expected.mean.total))}
    assert found.mean.weight == expected.mean.weight
    for name, metric in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name].total, metric.total, rtol=1e-5, err_msg=name)
    sizes = {name: np.abs(array).max() for name, array in tree.named_leaves(expected.gradients)}
    for (name, a), (_, b) in zip(tree.named_leaves(found.gradients), tree.named_leaves(expected.gradients), strict=True):
        result[name] = float(np.abs(a - b).max() / sizes[name.replace("/k/bias", "/q/bias")])
    return result
