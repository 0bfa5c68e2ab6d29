"""Everything that a training run carries from one step to the next, born on the mesh with its final sharding."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.models import heads
from jaxllm.transforms import adapt, depth, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Model, Params

KeyPath = Sequence[Any]
# Whether the array at a key path of the parameters is trained.
Selects = Callable[[KeyPath], bool]


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


def create(
    model: Model, optimizer: optax.GradientTransformation, config: Any, plan: Any, params: Params | None = None
) -> TrainState:
    """The state before the first step; each device makes its own part. params: to begin with, given away; None: drawn from config.seed."""
    shardings = jax.tree.map(lambda shape: shape.sharding, abstract(model, optimizer, config, plan))
    if params is None:
        return jax.jit(_make_init(model, optimizer, config), out_shardings=shardings)(random_key(config.seed, "init"))
    begin = partial(_begin, optimizer, config, model.axes)
    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params)


def random_key(seed: int, purpose: str) -> jax.Array:
    """The key of the one seed for "init", "dropout" or "answers": streams that never meet."""
    return jax.random.fold_in(jax.random.key(seed), ("init", "dropout", "answers").index(purpose))


def _make_init(model: Model, optimizer: optax.GradientTransformation, config: Any) -> Callable[[jax.Array], TrainState]:
    return lambda rng: _begin(optimizer, config, model.axes, model.init(rng))


def _begin(optimizer: optax.GradientTransformation, config: Any, axes: Any, whole: Params) -> TrainState:
    selects = trains(config, axes)
    params, frozen = tree.split_by(narrowed(whole, axes, config, selects), selects)
    check_floats(params, config)
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


def trains(config: Any, axes: Any) -> Selects:
    """Whether the array at a key path of a tree like `axes` is trained; ValueError if none is, or a pattern selects nothing.

    train.frozen_layers takes out what is below the layers (transforms/depth.py) and the first layers of each stack.
    """
    names, first = trainable(config, axes), config.train.frozen_layers

    def selects(path: KeyPath) -> bool:
        name, layer = tree.path_name(path), depth.layer_of(path)
        frozen = first and (depth.is_below(name) or (layer is not None and layer < first))
        return name in names and not frozen

    left = {tree.path_name(path) for path, _ in jax.tree.leaves_with_path(axes, is_leaf=adapt.is_axes) if selects(path)}
    named = names - _value(axes)
    beside = named - adapt.adapters(axes) if config.lora.also else set()
    for field, pattern, wanted in (
        ("train.trainable", config.train.trainable, named),
        ("lora.also", config.lora.also, beside),
    ):
        if wanted and not left & wanted:
            raise ValueError(
                f"train.frozen_layers = {first} freezes all that {field} = '{pattern}' selects.\n"
                "  Accepted: fewer frozen layers, or a pattern that also selects what stands behind them.\n  Change one of them."
            )
    return selects


def trainable(config: Any, axes: Any) -> set[str]:
    """Path names that the config's patterns select; ValueError if they select nothing, or no adapter where there are some."""
    adapters = adapt.adapters(axes) if config.train.trainable == "auto" else set()
    field, pattern = ("lora.also", config.lora.also) if adapters else ("train.trainable", config.train.trainable)
    if pattern == "auto":
        return set(tree.names(axes))
    try:
        found = adapters | _value(axes) | (tree.matches(pattern, axes) if pattern else set())
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    if (beside := adapt.adapters(axes)) and not beside & found:
        raise ValueError(
            f"train.trainable = '{pattern}' selects no array of the adapters that train.transforms = {config.train.transforms!r} adds:"
            " they would do nothing.\n  Accepted: auto, which trains them; a pattern that selects some of"
            f" {', '.join(sorted(beside)[:4])}, ...\n  Say in lora.also what is trained besides, or take the adapters out of"
            " train.transforms."
        )
    return found


def _value(axes: Any) -> set[str]:
    """Path names of a value head: it begins with nothing, so it is trained whatever the patterns say."""
    return {name for name in tree.names(axes) if name.startswith(f"{heads.VALUE}/")}


def check_floats(params: Params, config: Any) -> None:
    """ValueError for a trainable array of whole numbers."""
    found = (name for name, leaf in tree.named_leaves(params) if not jnp.issubdtype(leaf.dtype, jnp.floating))
    codes = list(dict.fromkeys(found))
    if not codes:
        return
    pattern, transforms = config.train.trainable, config.train.transforms
    named = ", ".join([*codes[:4], *(["..."] if len(codes) > 4 else [])])
    if pattern == "auto":
        raise ValueError(
            f"train.transforms = {transforms!r} without an adapter: nothing is trained. train.trainable = 'auto' would train the"
            f" kernels, but as codes ({named}) they have no gradient.\n"
            f"  Accepted: {(*transforms, 'lora')!r}, which trains an adapter beside each of them; a train.trainable that selects"
            " other parameters alone, such as '.*norm/.*'.\n  Add 'lora' (or 'dora') to train.transforms, or set train.trainable."
        )
    raise ValueError(
        f"train.trainable = '{pattern}' selects {named}, which train.transforms = {transforms!r} quantized: codes have no gradient.\n"
        "  Accepted: an adapter beside them, as train.transforms = ('nf4', 'lora'); a pattern that leaves them out.\n"
        "  Change train.transforms or train.trainable."
    )


def narrowed(params: Params, axes: Any, config: Any, selects: Selects, under: KeyPath = ()) -> Params:
    """The parameters, matrices that are not trained in the dtype precision.frozen; `under`: the key path of what is only a part.

    Vectors are few, and the scales of quantized kernels belong to their codes: they stay as they are.
    """
    dtype = jnp.dtype(config.precision.frozen)

    def one(path: KeyPath, axes: Any, leaf: Any) -> Any:
        kept = isinstance(leaf, Quantized) or selects((*under, *path)) or len(adapt.within_layer(axes)) == 1
        return leaf if kept else leaf.astype(dtype)

    return jax.tree.map_with_path(one, axes, params, is_leaf=lambda node: adapt.is_axes(node) or isinstance(node, Quantized))


def _first_scale(precision: Any) -> LossScale:
    return LossScale(jnp.asarray(precision.loss_scale, jnp.float32), jnp.zeros((), jnp.int32))
