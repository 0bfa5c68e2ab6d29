"""Everything that a training run carries from one step to the next, born on the mesh with its final sharding."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.transforms import depth, tree
from jaxllm.types import Model, Params


@partial(jax.tree_util.register_dataclass, data_fields=("scale", "finite_steps"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scale of float16. `finite_steps` counts the finite steps since it last changed."""

    scale: jax.Array
    finite_steps: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "frozen", "opt_state", "ema", "loss_scale", "skipped", "skipped_in_a_row"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The carry of the train step. Counters are int32 scalars.

    step: updates done, skipped ones included. It alone drives the schedule, the data order and the random numbers.
    params: trainable parameters, None where one is frozen; frozen: the reverse. `full_params` puts them together.
    opt_state: of the trainable parameters. ema: their moving average, or None if train.ema_decay = 0.
    loss_scale: None unless precision.compute = "float16".
    skipped: steps whose loss or gradient was not finite, in all; skipped_in_a_row: up to now (see step.py for float16).
    """

    step: jax.Array
    params: Params
    frozen: Params
    opt_state: Any
    ema: Params | None
    loss_scale: LossScale | None
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def full_params(state: TrainState) -> Params:
    """The parameters that a model takes: trainable and frozen ones together."""
    return tree.combine(state.params, state.frozen)


def eval_params(state: TrainState) -> Params:
    """The parameters to evaluate, sample from and export: the moving average if there is one."""
    return tree.combine(state.params if state.ema is None else state.ema, state.frozen)


def abstract(model: Model, optimizer: optax.GradientTransformation, config: Any, plan: Any) -> TrainState:
    """The state as ShapeDtypeStructs with the shardings of the plan; allocates nothing. ValueError if nothing is trainable."""
    rng = jax.random.key(0)
    shapes = jax.eval_shape(_make_init(model, optimizer, config), rng)
    params = jax.eval_shape(model.init, rng)
    shardings = plan.state_shardings(shapes, model.axes, params)
    own, frozen = tree.split_by(plan.shardings(model.axes, params), trains(config, model.axes))
    shardings = dataclasses.replace(shardings, params=own, frozen=frozen)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def create(model: Model, optimizer: optax.GradientTransformation, config: Any, plan: Any) -> TrainState:
    """The state before the first step, drawn from config.seed; each device makes its own part."""
    shardings = jax.tree.map(lambda shape: shape.sharding, abstract(model, optimizer, config, plan))
    return jax.jit(_make_init(model, optimizer, config), out_shardings=shardings)(random_key(config.seed, "init"))


def random_key(seed: int, purpose: str) -> jax.Array:
    """The key of the one seed for "init" or "dropout": streams that never meet."""
    return jax.random.fold_in(jax.random.key(seed), ("init", "dropout").index(purpose))


def _make_init(model: Model, optimizer: optax.GradientTransformation, config: Any) -> Callable[[jax.Array], TrainState]:
    selects = trains(config, model.axes)

    def init(rng: jax.Array) -> TrainState:
        params, frozen = tree.split_by(model.init(rng), selects)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            frozen=frozen,
            opt_state=optimizer.init(params),
            ema=params if config.train.ema_decay else None,
            loss_scale=_first_scale(config.precision) if config.precision.compute == "float16" else None,
            skipped=zero,
            skipped_in_a_row=zero,
        )

    return init


def trains(config: Any, axes: Any) -> Callable[[Sequence[Any]], bool]:
    """Whether the array at a key path of a tree like `axes` is trained; ValueError if none is.

    train.frozen_layers takes out what is below the layers (transforms/depth.py) and the first layers of each stack.
    """
    try:
        trainable = tree.matches(config.train.trainable, axes)
    except ValueError as error:
        raise ValueError(f"train.trainable: {error}") from None
    first = config.train.frozen_layers

    def selects(path: Sequence[Any]) -> bool:
        name, layer = tree.path_name(path), depth.layer_of(path)
        frozen = first and (depth.is_below(name) or (layer is not None and layer < first))
        return name in trainable and not frozen

    if not any(selects(path) for path, _ in jax.tree.leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))):
        raise ValueError(
            f"train.frozen_layers = {first} freezes all that train.trainable = '{config.train.trainable}' selects.\n"
            "  Accepted: fewer frozen layers, or a pattern that also selects what stands behind them.\n  Change one of them."
        )
    return selects


def _first_scale(precision: Any) -> LossScale:
    return LossScale(jnp.asarray(precision.loss_scale, jnp.float32), jnp.zeros((), jnp.int32))
