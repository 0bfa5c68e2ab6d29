"""What all models share in becoming pure functions: parameters and their axes out of linen, and the checks of what they are called with."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxllm.models import stack
from jaxllm.models.architecture import Architecture
from jaxllm.transforms import adapt, tree
from jaxllm.types import Batch, Constrain, Params, Stack


class Layers(NamedTuple):
    """So many equal layers. `path`: where their parameters are. `declare(rng)`: those of one layer, boxed with their axes."""

    path: tuple[str, ...]
    number: int
    declare: Callable[[jax.Array], Params]


def make_init(
    arch: Architecture, declare_rest: Callable[[jax.Array], Params], stacks: Sequence[Layers]
) -> tuple[Callable[[jax.Array], Params], Any]:
    """(init, axes): parameters from an rng, and their logical axes from tracing it, without allocating anything; both transformed."""

    def dense(rng: jax.Array) -> Params:
        params = _open(declare_rest(rng), lambda box: box.value)
        keys = (rng, *jax.random.split(rng, len(stacks)))
        for layers, key in zip(stacks, keys, strict=False):

            def one(key: jax.Array, layers: Layers = layers) -> Params:
                return _open(layers.declare(key), lambda box: box.value)

            tree.put(params, layers.path, stack.init(arch.layers_as, layers.number, one, key))
        return params

    rng = jax.random.key(0)
    axes = _open(jax.eval_shape(declare_rest, rng), lambda box: box.names)
    for layers in stacks:
        layer_axes = _open(jax.eval_shape(layers.declare, rng), lambda box: box.names)
        tree.put(axes, layers.path, stack.axes(arch.layers_as, layers.number, layer_axes))
    adaptation = adapt.Adaptation(axes, arch.transforms)
    adaptation.check()

    def init(rng: jax.Array) -> Params:
        return adaptation.params(dense(rng), rng)

    # Compiled as a whole: linen makes parameters by running the layers, and only the compiler leaves that out.
    return jax.jit(init), adaptation.axes()


def _open(boxed: Params, what: Callable[[nn.Partitioned], Any]) -> Params:
    return jax.tree.map(what, boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned))


def run_stacks(
    arch: Architecture, constrain: Constrain, stacks: Sequence[Stack], axes: Any
) -> Callable[[Params, Batch, jax.Array | None], jax.Array]:
    """hidden(params, batch, rng): one stack after the other; `axes` are those of the parameters."""
    runners = [
        stack.make(arch.layers_as, each.layers, arch.remat, gatherer(arch, constrain, tree.get(axes, each.path))) for each in stacks
    ]

    def hidden(params: Params, batch: Batch, rng: jax.Array | None) -> jax.Array:
        parts: dict[str, jax.Array] = {}
        for each, run in zip(stacks, runners, strict=True):
            x = each.enter(params, batch, rng)
            x, _ = run(each.block(params, parts, batch, rng), tree.get(params, each.path), x)
            parts[each.part] = each.leave(params, x)
        return parts["x"]

    return hidden


def gatherer(arch: Architecture, constrain: Constrain, layers_axes: Any) -> stack.Gather:
    """What makes the parameters of one layer whole, given the axes of all of them."""
    layer_axes = stack.axes_of_one(arch.layers_as, layers_axes)
    return stack.Gather(lambda layer: constrain.gather(layer, layer_axes), again=constrain.parts("embed") > 1)


def caller(network: nn.Module) -> Callable[..., Any]:
    """call(method, params, *inputs, rng=None): one method of the network as a pure function; `rng` switches dropout on."""

    def call(method: str, params: Params, *inputs: Any, rng: jax.Array | None = None) -> Any:
        return network.apply({"params": params}, *inputs, method=method, rngs={} if rng is None else {"dropout": rng})

    return call


def present(**arrays: jax.Array | None) -> Batch:
    """Those arrays that are given."""
    return {name: array for name, array in arrays.items() if array is not None}


def places(constrain: Constrain, tokens_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """The positions of the tokens: those given, or their places in the row, [1, T]."""
    return constrain.places(tokens_BT.shape[1])[None] if positions_BT is None else positions_BT


def check_tokens(what: str, tokens_BT: jax.Array, context_tokens: int, **beside: jax.Array | None) -> None:
    """ValueError unless the tokens are integers [B, T] that fit the context, and what goes beside them has their shape."""
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(
            f"{what} are {tokens_BT.dtype} of shape {tokens_BT.shape}.\n  Accepted: integers of shape [batch, length]."
            "\n  Pass a batch of token ids; a single sequence is tokens[None]."
        )
    if tokens_BT.shape[1] > context_tokens:
        raise ValueError(
            f"{tokens_BT.shape[1]} {what} in a row.\n  Accepted: up to model.context_tokens = {context_tokens}."
            "\n  Shorten the rows, or train a model with a longer context."
        )
    for name, array in beside.items():
        if array is not None and array.shape != tokens_BT.shape:
            raise ValueError(
                f"{name} has shape {array.shape}.\n  Accepted: that of the {what}, {tokens_BT.shape}.\n  Pass one number a token."
            )
