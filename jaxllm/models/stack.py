"""How a stack of equal layers is run: the one place that knows the form of `params["layers"]`.

    unrolled  a list with one tree a layer, run by a Python loop: 1.24-1.31 times as fast as scan on a CPU, and with 0.6 of its memory
    scan      one tree whose arrays have a leading layer axis, run by `lax.scan`: compile time does not grow with depth

Both give the same numbers from the same initial weights. transforms/tree.py turns one form into the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxllm.models import remat as remats
from jaxllm.models.cache import Slot
from jaxllm.transforms import tree

# (parameters of one layer, its index, x, its cache slot or None) -> (x, slot)
Block = Callable[[Any, Any, jax.Array, Slot | None], tuple[jax.Array, Slot | None]]


class Runner(Protocol):
    """Sends x through all layers: run(block, params["layers"], x, cache["layers"] or None) -> (x, the cache's layers)."""

    def __call__(self, block: Block, layers: Any, x: jax.Array, cache: Any = None, /) -> tuple[jax.Array, Any]: ...


class Gather(NamedTuple):
    """whole(parameters of a layer) -> the same as the layer takes them (types.Constrain). again: devices hold shares of them, which the
    backward pass makes whole anew: kept from the forward pass, the whole model would be on each device (ZeRO-3)."""

    whole: Callable[[Any], Any]
    again: bool


NO_GATHER = Gather(lambda layer: layer, again=False)


def make(layers_as: str, count: int, remat: remats.Remat, gather: Gather = NO_GATHER) -> Runner:
    """The runner of `count` layers in the form `layers_as`; `remat` says what the backward pass computes again (models/remat.py)."""
    loop = {"unrolled": _unrolled, "scan": _scan}[layers_as]

    def run(block: Block, layers: Any, x: jax.Array, cache: Any = None, /) -> tuple[jax.Array, Any]:
        _check(layers, layers_as, count)
        block = _gathering(block, gather.whole)
        # Decoding has no backward pass.
        return loop(block if cache is not None else remats.over("layer", remat, block, layers_as, gather.again), layers, x, cache)

    return run


def init(layers_as: str, count: int, init_layer: Callable[[jax.Array], Any], rng: jax.Array) -> Any:
    """Parameters of all layers; layer i is `init_layer(fold_in(rng, i))` in both forms."""
    # A loop, since XLA takes 0.5 s to compile a random generator and would need one a layer. Cutting its result apart holds the
    # parameters twice for a moment; training will hold them four times.
    stacked = jax.lax.map(lambda index: init_layer(jax.random.fold_in(rng, index)), jnp.arange(count))
    return tree.unstack_like(stacked, [stacked] * count) if layers_as == "unrolled" else stacked


def axes(layers_as: str, count: int, layer_axes: Any) -> Any:
    """Logical axes of all layers, given those of one."""
    if layers_as == "unrolled":
        return [layer_axes] * count
    return jax.tree.map(lambda names: ("layers", *names), layer_axes, is_leaf=lambda node: isinstance(node, tuple))


def axes_of_one(layers_as: str, layers_axes: Any) -> Any:
    """The inverse of `axes`."""
    if layers_as == "unrolled":
        return layers_axes[0]
    return jax.tree.map(lambda names: names[1:], layers_axes, is_leaf=lambda node: isinstance(node, tuple))


def _unrolled(block: Block, layers: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    slots = []
    for index, params in enumerate(layers):
        x, slot = block(params, index, x, None if cache is None else Slot(cache[index], None))
        slots.append(None if slot is None else slot.arrays)
    return x, None if cache is None else slots


def _scan(block: Block, layers: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    def body(carry: tuple[jax.Array, Any], layer: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
        (x, cache), (params, index) = carry, layer
        x, slot = block(params, index, x, None if cache is None else Slot(cache, index))
        return (x, None if slot is None else slot.arrays), None

    count = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(body, (x, cache), (layers, jnp.arange(count)))[0]


def _gathering(block: Block, gather: Callable[[Any], Any]) -> Block:
    def run(params: Any, index: Any, x: jax.Array, slot: Slot | None) -> tuple[jax.Array, Slot | None]:
        return block(gather(params), index, x, slot)

    return run


def _check(layers: Any, layers_as: str, count: int) -> None:
    """ValueError unless `layers` has this form and this many layers."""
    if isinstance(layers, list) != (layers_as == "unrolled"):
        given = "a list with one tree a layer" if isinstance(layers, list) else "one tree of stacked layers"
        raise ValueError(
            f"params['layers'] is {given}, but model.layers_as = '{layers_as}'.\n  Accepted: the other form."
            "\n  Change model.layers_as, or convert with transforms.tree.stack_layers or unstack_like."
        )
    found = {"layers": len(layers)} if isinstance(layers, list) else {name: x.shape[0] for name, x in tree.named_leaves(layers)}
    for name, length in found.items():
        if length != count:
            raise ValueError(
                f"parameter '{name}' has {length} layers.\n  Accepted: model.layers = {count}."
                "\n  Use parameters made with this config, or change model.layers."
            )
