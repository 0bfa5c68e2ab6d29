"""A model compressed layer by layer: each layer reads what the compressed ones before it make of the calibration data.

The hidden states of all calibration batches pass through one layer after the other. Within a layer, kernels come in groups that read
the same array (q, k, v; then o; then gate, up; then down), in the order in which they multiply, so that the statistics of a group can be
taken with the groups before it compressed (Frantar et al. 2023, arXiv:2210.17323, section 4, and "true sequential" in its code). An
encoder's layers come before those of the decoder, which reads what the compressed encoder gives.

Besides the model, a device holds the statistics of one group and one batch of hidden states; the others wait in the host's memory. Each
kind of layer is compiled once, however many there are: one program for the statistics of a group, and one for the whole layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.compression import statistics
from jaxllm.compression.statistics import Statistics
from jaxllm.transforms import tree
from jaxllm.types import Batch, Model, Params, Stack

# Names of kernels within a layer, "attention/q/kernel", that read the same array.
Group = tuple[str, ...]
# Where a batch says which tokens are padding, by the part of the model that reads them (types.Stack.part).
SEGMENTS = {"x": "segments", "memory": "input_segments"}


class Layers:
    """The layers of a stack, taken out and put back one by one: of a list, or of one tree with a leading layer axis."""

    def __init__(self, layers: Any):
        self._before = layers
        self._form: Any = None
        # Of a list each dense layer can go when its successor is there.
        self.after: Any = layers if isinstance(layers, list) else None

    def __len__(self) -> int:
        return len(self._before) if isinstance(self._before, list) else len(jax.tree.leaves(self._before)[0])

    def take(self, index: int) -> Params:
        """The parameters of one layer."""
        layer: Params = self._before[index] if isinstance(self._before, list) else _cut(self._before, index)
        return layer

    def put(self, index: int, layer: Params) -> None:
        """Sets a layer of `after`, the first one first. ValueError if layers are stacked and it has other leaf types than the first."""
        if isinstance(self._before, list):
            self.after[index] = layer
            return
        if index == 0:
            self.after = jax.tree.map(lambda leaf: jnp.zeros((len(self), *leaf.shape), leaf.dtype), layer)
            self._form = jax.tree.structure(layer)
        if self._form != jax.tree.structure(layer):
            raise ValueError(
                f"layer {index} was compressed to other forms than layer 0, and model.layers_as = 'scan'.\n"
                "  Accepted: the same form of a kernel in all layers, or model.layers_as = 'unrolled'.\n  Change one of them."
            )
        self.after = _put(self.after, layer, index)


_cut = jax.jit(lambda layers, index: jax.tree.map(lambda leaf: leaf[index], layers))


def _put_in(layers: Params, layer: Params, index: jax.Array) -> Params:
    return jax.tree.map(lambda whole, part: whole.at[index].set(part), layers, layer)


# In place: there is never a second copy of all layers.
_put = jax.jit(_put_in, donate_argnums=0)


class Site:
    """One layer of a model, and the calibration data as it reaches it.

    path: of its stack, ("layers",). number: over all stacks. groups: its kernels, in the order in which they multiply.
    """

    def __init__(self, programs: "_Programs", index: int, number: int, stream: Sequence["_At"]):
        self.path, self.number, self.groups = programs.stack.path, number, programs.groups
        self._programs, self._index, self._stream = programs, index, stream

    def statistics(self, layer: Params, group: Group) -> Statistics:
        """Of what the kernels of a group read, with these parameters of the layer. Padding does not count."""
        return self._programs.statistics(layer, self._index, self._stream, group[0])

    def outputs(self, layer: Params, most_tokens: int = 0) -> list[jax.Array]:
        """What comes out of the layer with these parameters, [B, T, D] for each batch, 0 at padding; of the first batches that have so many
        tokens."""
        found, tokens = list[jax.Array](), 0
        for at in self._stream:
            found.append(self._programs.seen(self._programs.run(layer, self._index, at), at.batch))
            tokens += found[-1].shape[0] * found[-1].shape[1]
            if most_tokens and tokens >= most_tokens:
                break
        return found


# compress(the parameters of a layer, its site) -> its parameters.
Compress = Callable[[Params, Site], Params]


def walk(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    compress: Compress,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Params:
    """`params` with each layer as `compress` gives it, changed in place, so that what was before can go as soon as possible.

    batches: of one shape; tokens of segment 0 do not count. tell(done, of): after each layer.
    """
    parts: list[dict[str, Any]] = [{} for _ in batches]
    number, every = 0, sum(stack.layers for stack in model.stacks)
    rest = _rest(model, params)
    for stack in model.stacks:
        programs, layers = _Programs(stack, rest), Layers(tree.get(params, stack.path))
        # The host keeps what all batches have come to.
        stream = [_At(batch, held, jax.device_get(programs.enter(rest, batch))) for batch, held in zip(batches, parts, strict=True)]
        programs.look(layers.take(0), stream[0])
        for index in range(stack.layers):
            layer = compress(layers.take(index), Site(programs, index, number, stream))
            layers.put(index, layer)
            # One by one: a second list of all hidden states would take their memory twice.
            for place, at in enumerate(stream):
                stream[place] = at._replace(x=jax.device_get(programs.run(layer, index, at)))
            number += 1
            tell(number, every)
        tree.put(params, stack.path, layers.after)
        if stack is not model.stacks[-1]:
            for at in stream:
                at.parts[stack.part] = jax.device_get(programs.leave(rest, at.x))
    return params


def _rest(model: Model, params: Params) -> Params:
    """The parameters outside of the layers."""
    for stack in model.stacks:
        params = tree.without(params, stack.path)
    return params


class _At(NamedTuple):
    """A batch in front of a layer. parts: what earlier stacks gave; x: what enters the layer, [B, T, D]."""

    batch: Batch
    parts: dict[str, Any]
    x: Any


class _Programs:
    """What is compiled for the layers of one stack, which are alike. rest: the parameters outside of the layers."""

    def __init__(self, stack: Stack, rest: Params):
        self.stack, self._rest = stack, rest
        self.groups: tuple[Group, ...] = ()
        # By name of a kernel: the part that it reads the tokens of; and the shapes of its statistics.
        self._part: dict[str, str] = {}
        self._shapes: dict[str, Statistics] = {}
        # Of parts that earlier stacks gave, which all layers read alike.
        self._known: dict[str, Statistics] = {}
        self.enter = jax.jit(lambda rest, batch: stack.enter(rest, batch, None))
        self.leave = jax.jit(stack.leave)
        self._run_compiled = jax.jit(self._run)
        self._measure = jax.jit(self._measured, static_argnums=0, donate_argnums=1)

    def look(self, layer: Params, at: _At) -> None:
        """Finds which kernels read the same, by tracing a layer."""
        names = [name for name in tree.names(layer) if name.endswith("/kernel")]

        def trace(rest: Params, layer: Params, at: _At) -> dict[str, Statistics]:
            found = statistics.reads(lambda layer: self._run(rest, layer, 0, at), layer, names)
            self.groups = statistics.groups(found)
            for name, read in found.items():
                self._part[name] = next((part for part, array in at.parts.items() if array is read.x), self.stack.part)
            return {name: statistics.of(read, None) for name, read in found.items()}

        self._shapes = jax.eval_shape(trace, self._rest, layer, at)

    def run(self, layer: Params, index: int, at: _At) -> jax.Array:
        """What comes out of the layer, [B, T, D]."""
        return self._run_compiled(self._rest, layer, index, at)

    def seen(self, x_BTD: jax.Array, batch: Batch) -> jax.Array:
        """0 where the stack reads padding."""
        segments = batch.get(SEGMENTS[self.stack.part])
        return x_BTD if segments is None else jnp.where(segments[:, :, None] > 0, x_BTD, 0)

    def statistics(self, layer: Params, index: int, stream: Sequence[_At], name: str) -> Statistics:
        """Of what a kernel reads over the whole stream."""
        part = self._part[name]
        if part in self._known:
            return self._known[part]
        total = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), self._shapes[name])
        for at in stream:
            total = self._measure(name, total, self._rest, layer, index, at)
        if part != self.stack.part:
            self._known[part] = total
        return total

    def _measured(self, name: str, total: Statistics, rest: Params, layer: Params, index: jax.Array, at: _At) -> Statistics:
        """`total` with a batch added."""
        read = statistics.reads(lambda layer: self._run(rest, layer, index, at), layer, (name,))[name]
        return statistics.add(total, statistics.of(read, self._is_real(name, at.batch)))

    def _is_real(self, name: str, batch: Batch) -> jax.Array | None:
        """bool [B, T]: which tokens are no padding, of those that the kernel reads; None: all."""
        segments = batch.get(SEGMENTS[self._part[name]])
        return None if segments is None else segments > 0

    def _run(self, rest: Params, layer: Params, index: Any, at: _At) -> jax.Array:
        x: jax.Array = self.stack.block(rest, at.parts, at.batch, None)(layer, index, at.x, None)[0]
        return x
