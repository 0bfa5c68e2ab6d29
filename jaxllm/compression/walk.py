"""Layer by layer through a model with calibration data: what reaches a layer has gone through the changed ones before it.

So the errors of earlier layers are part of what a later one is fitted to. Beside the model there are one layer's statistics and what has
come out of the layers so far, for all rows: B x T x D numbers a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.compression.statistics import Moments, Recorder, zeros
from jaxllm.transforms import tree
from jaxllm.types import Batch, Model, Params, Stack

# Kernels of a layer in the order in which they are used; those of a group read the same.
GROUPS = (
    ("attention/q", "attention/k", "attention/v"),
    ("attention/o",),
    ("cross/q",),
    ("cross/k", "cross/v"),
    ("cross/o",),
    ("mlp/gate", "mlp/up"),
    ("mlp/down",),
)
# Read what the encoder gave.
OF_MEMORY = ("cross/k", "cross/v")


def kernel_of(layer: Params, name: str) -> Any:
    """The kernel of a projection of a layer, "attention/q"."""
    return tree.get(layer, (*name.split("/"), "kernel"))


def with_kernel(layer: Params, name: str, kernel: Any) -> Params:
    """The layer with another kernel; nothing is changed in place."""
    return tree.replaced(layer, (*name.split("/"), "kernel"), kernel)


def groups(layer: Params, chosen: Callable[[str], bool]) -> list[tuple[str, ...]]:
    """Those of GROUPS that the layer has, of the kernels that are chosen by their names."""
    found = [tuple(name for name in group if _has(layer, name) and chosen(name)) for group in GROUPS]
    return [group for group in found if group]


def _has(layer: Params, name: str) -> bool:
    part, projection = name.split("/")
    return projection in layer.get(part, {})


class Site:
    """One layer of a model, and the calibration data as it reaches it.

    path: of its stack, ("layers",). index: in the stack. number: over all stacks.
    """

    def __init__(self, runner: "_Runner", index: int, number: int, rest: Params, reached: Sequence["_Reached"]) -> None:
        self.path, self.index, self.number = runner.stack.path, index, number
        self._runner, self._rest, self._reached = runner, rest, reached

    def moments(self, layer: Params, name: str) -> Moments:
        """Of what the kernel `name` reads, with these parameters of the layer. A quantized kernel reads the same."""
        total = None
        for each in self._reached:
            found = self._runner.record(self._rest, layer, self.index, each, name)
            total = found if total is None else total.merge(found)
        assert total is not None
        return total

    def outputs(self, layer: Params, most_tokens: int = 0) -> list[jax.Array]:
        """What comes out of the layer with these parameters, [B, T, D] for each batch; of the first batches that have so many tokens."""
        found, tokens = [], 0
        for each in self._reached:
            found.append(self._runner.forward(self._rest, layer, self.index, each))
            tokens += found[-1].shape[0] * found[-1].shape[1]
            if most_tokens and tokens >= most_tokens:
                break
        return found


class _Reached:
    """A batch, and how far it has come: x [B, T, D]; parts: what earlier stacks gave."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.parts = batch, dict[str, jax.Array]()
        self.x: jax.Array | None = None


class _Runner:
    """The compiled functions of one stack: the same for all its layers, as long as their kernels have the same forms."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._forward = jax.jit(self._run)
        self._record = jax.jit(self._moments, static_argnames="name")

    def forward(self, rest: Params, layer: Params, index: int, each: _Reached) -> jax.Array:
        return self._forward(rest, layer, index, each.x, dict(each.batch), each.parts)

    def record(self, rest: Params, layer: Params, index: int, each: _Reached, name: str) -> Moments:
        return self._record(rest, layer, index, each.x, dict(each.batch), each.parts, name=name)

    def _run(self, rest: Params, layer: Params, index: Any, x: jax.Array, batch: Batch, parts: Any) -> jax.Array:
        return self.stack.block(rest, parts, batch, None)(layer, index, x, None)[0]

    def _moments(self, rest: Params, layer: Params, index: Any, x: jax.Array, batch: Batch, parts: Any, *, name: str) -> Moments:
        kernel = kernel_of(layer, name)
        inputs = kernel.shape[:2] if name.endswith("/o") else kernel.shape[:1]
        weights_BT = self._weights(batch, "memory" if name in OF_MEMORY else self.stack.part)

        def total(moments: Moments) -> jax.Array:
            recording = with_kernel(layer, name, Recorder(kernel, weights_BT, moments))
            return self._run(rest, recording, index, x, batch, parts).astype(jnp.float32).sum()

        return jax.grad(total)(zeros(inputs[0] * inputs[-1] if len(inputs) > 1 else inputs[0]))

    def _weights(self, batch: Batch, part: str) -> jax.Array:
        """1 for the tokens that pass through the part, 0 for padding."""
        tokens, segments = ("inputs", "input_segments") if part == "memory" else ("tokens", "segments")
        there = batch[segments] > 0 if segments in batch else jnp.ones(batch[tokens].shape, bool)
        return there.astype(jnp.float32)


Compress = Callable[[Params, Site], Params]


def walk(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    compress: Compress,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Params:
    """The parameters with each layer as `compress(layer, site)` gives it. Layers are unrolled; the lists of layers in `params` are changed
    in place, so that each dense layer can go when its successor is there.

    tell(done, of): after each layer.
    """
    reached = [_Reached(batch) for batch in batches]
    every = sum(stack.layers for stack in model.stacks)
    number = 0
    for stack in model.stacks:
        runner, layers = _Runner(stack), tree.get(params, stack.path)
        rest = _without_layers(params, model)
        enter, leave = jax.jit(partial(_enter, stack)), jax.jit(stack.leave)
        for each in reached:
            each.x = enter(rest, dict(each.batch))
        for index in range(stack.layers):
            layers[index] = compress(layers[index], Site(runner, index, number, rest, reached))
            for each in reached:
                each.x = runner.forward(rest, layers[index], index, each)
            number += 1
            tell(number, every)
        for each in reached:
            each.parts[stack.part] = leave(rest, each.x)
    return params


def _enter(stack: Stack, rest: Params, batch: Batch) -> jax.Array:
    return stack.enter(rest, batch, None)


def _without_layers(params: Params, model: Model) -> Params:
    for stack in model.stacks:
        params = tree.without(params, stack.path)
    return params
