"""What a device of a pipeline does in a tick, for one stack of layers: a pass forward, or one of the two halves of a pass backward.

Differentiation is by hand. A backward pass starts from the input of the stage, which is all that was kept, and runs its layers again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.stack import Runner
from jaxllm.parallel.region import Region
from jaxllm.transforms import deferred, tree
from jaxllm.transforms.deferred import Deferred, Factors, Notes, Probe
from jaxllm.types import Batch, Mean, Metrics, Model, Objective, Params, Stack

# Activations, or their gradients, by the part of the model that they are of (types.Stack.part).
Parts = dict[str, jax.Array]


class Row(NamedTuple):
    """What a device does in a tick: int32 scalars. branch: 0 where it idles; chunk: within a stack; slots as in pipeline/buffers.py."""

    branch: Any
    microbatch: Any
    chunk: Any
    arrive_x: Any
    arrive_dy: Any
    x_slot: Any
    dy_slot: Any
    w_slot: Any


class Carry(NamedTuple):
    """What a device keeps from tick to tick.

    x, dy: activations and their gradients that wait, [slots, ...]. factors: of kernels' gradients, by stack, [slots, K, ...].
    layers, rest: gradients so far, of the layers by stack, [V, K, ...], and of all else. sent_x, sent_dy: what is on its way.
    """

    x: Parts
    dy: Parts
    factors: list[Any]
    layers: list[Params]
    rest: Params
    mean: Mean
    metrics: Metrics
    sent_x: Parts
    sent_dy: Parts


@dataclass(frozen=True)
class Rest:
    """The parameters outside the layers on one device, whole over the stages. watched: what their gradients are taken with respect to."""

    region: Region
    params: Params
    watched: Params

    def open(self, watched: Params | None = None) -> Params:
        """As the model takes them; with `watched`, as a function of it."""
        return self.region.open(self.params if watched is None else self.region.attach(self.params, watched))


class _Tick(NamedTuple):
    """A row, looked up. parts: what waits in its x slot; values: the chunk's parameters; first, last: whether it is that of its stack."""

    batch: Batch
    rng: jax.Array | None
    parts: Parts
    values: Params
    chunk: jax.Array
    first: jax.Array
    last: jax.Array


@dataclass(frozen=True)
class Stage:
    """One stack on one device.

    ends: the model ends with this stack, the number `index` of its stacks. params, trained: the parameters of its layers, [V, K, ...],
    all of them, and with holes where they are frozen; region: that of one chunk. batch: [M, ...]. stages, stage: how many, and which
    this is. trains: the schedule has backward passes. parts: shapes of what travels.
    """

    model: Model
    objective: Objective
    stack: Stack
    index: int
    ends: bool
    runner: Runner
    region: Region
    params: Params
    trained: Params
    rest: Rest
    batch: Batch
    rng: jax.Array | None
    stages: int
    stage: jax.Array
    trains: bool
    parts: dict[str, jax.ShapeDtypeStruct]

    def forward(self, carry: Carry, row: Row) -> Carry:
        at, part = self._look_up(carry, row), self.stack.part

        def through() -> jax.Array:
            return self._layers(at.values, self.rest.open(), self._input(at), at.parts, at)

        if not self.ends:
            x = jax.lax.cond(at.last, lambda x: self.stack.leave(self.rest.open(), x), lambda x: x, through())
            return carry._replace(sent_x={**at.parts, part: x})
        if self.trains:  # the backward pass, which comes next there, does all of the last stage's work
            x = jax.lax.cond(at.last, lambda: jnp.zeros_like(at.parts[part]), through)
            return carry._replace(sent_x={**at.parts, part: x})
        x = through()
        nothing = jax.tree.map(jnp.zeros_like, (carry.mean, carry.metrics))
        found = jax.lax.cond(at.last, lambda: self._loss(self.rest.open(), x, at), lambda: nothing)
        mean, metrics = _add((carry.mean, carry.metrics), found)
        return carry._replace(sent_x={**at.parts, part: x}, mean=mean, metrics=metrics)

    def backward_input(self, carry: Carry, row: Row) -> Carry:
        at, part = self._look_up(carry, row), self.stack.part
        others = {name: array for name, array in at.parts.items() if name != part}

        def layers(direct: Params, factors: Any, watched: Params, x: jax.Array, others: Parts) -> jax.Array:
            return self._layers(self._defer(self.region.attach(at.values, direct), factors), self.rest.open(watched), x, others, at)

        direct = self.region.watch(self._trained(row, kernels=False))
        x, back = jax.vjp(layers, direct, self.factors(), self.rest.watched, self._input(at), others)
        incoming = {name: _read(held, row.dy_slot) for name, held in carry.dy.items()}
        dx, carry = self._end(carry, x, incoming[part], at)
        ddirect, factors, drest, dx, dothers = back(dx)
        carry = self._begin(carry._replace(rest=_add(carry.rest, drest)), dx, at)
        # What only passes through here has a gradient from behind, too, but where the model ends.
        arrives = jnp.where(at.last, 0, 1) if self.ends else 1
        sent = {name: d + incoming[name] * jnp.asarray(arrives, d.dtype) for name, d in dothers.items()}
        return carry._replace(
            sent_dy={**sent, part: jnp.where(at.first, jnp.zeros_like(dx), dx)},
            layers=_with(carry.layers, self.index, _add_at(carry.layers[self.index], row.chunk, ddirect)),
            factors=_with(carry.factors, self.index, put(carry.factors[self.index], row.w_slot, factors)),
        )

    def backward_weight(self, carry: Carry, row: Row) -> Carry:
        uses, factors = self._uses(), carry.factors[self.index]

        def layer(number: jax.Array, sums: Params) -> Params:
            """Adds the gradients of the kernels of one layer."""

            def one(path: Any, axes: Any, sum: Any, factors: Factors | None) -> Any:
                if factors is None:
                    return sum
                mine = jax.tree.map(lambda held: held[jnp.maximum(row.w_slot, 0), number], factors)
                found = self.region.cut(axes[1:], deferred.gradient(uses[tree.path_name(path)], mine))
                return sum.at[row.chunk, number].add(found)

            return jax.tree.map_with_path(one, self.region.axes, sums, factors, is_leaf=_is_axes)

        sums = jax.lax.fori_loop(0, self._layers_a_chunk, layer, carry.layers[self.index])
        return carry._replace(layers=_with(carry.layers, self.index, sums))

    @property
    def _chunks(self) -> int:
        return jax.tree.leaves(self.params)[0].shape[0]

    @property
    def _layers_a_chunk(self) -> int:
        return jax.tree.leaves(self.params)[0].shape[1]

    def factors(self) -> Params:
        """Zeros in the shape of the factors of the kernels' gradients, [K, ...]; holes elsewhere."""
        uses, layers = self._uses(), self._layers_a_chunk

        def one(path: Any, axes: Any, leaf: Any) -> Factors | None:
            if leaf is None or not _is_kernel(path):
                return None
            return jax.tree.map(lambda shape: jnp.zeros((layers, *shape.shape), shape.dtype), uses[tree.path_name(path)].factors)

        return jax.tree.map_with_path(one, self.region.axes, self.trained, is_leaf=_is_axes)

    def loss_shapes(self) -> tuple[Mean, Metrics]:
        """Of what is minimized and the metrics of a micro-batch."""
        batch, x = self._first_batch(), self.entered()
        return jax.eval_shape(lambda x: self._loss_of(self.rest.open(), x, batch), x)

    def entered(self) -> jax.ShapeDtypeStruct:
        """Of what enters the first layer."""
        return jax.eval_shape(lambda: self.stack.enter(self.rest.open(), self._first_batch(), self.rng))

    def _first_batch(self) -> Batch:
        return {name: array[0] for name, array in self.batch.items()}

    def _look_up(self, carry: Carry, row: Row) -> _Tick:
        return _Tick(
            batch={name: array[row.microbatch] for name, array in self.batch.items()},
            rng=None if self.rng is None else jax.random.fold_in(self.rng, row.microbatch),
            parts={name: _read(held, row.x_slot) for name, held in carry.x.items()},
            values=jax.tree.map(lambda leaf: _of_chunk(leaf, row.chunk), self.params),
            chunk=row.chunk,
            first=(self.stage == 0) & (row.chunk == 0),
            last=(self.stage == self.stages - 1) & (row.chunk == self._chunks - 1),
        )

    def _trained(self, row: Row, kernels: bool) -> Params:
        """A chunk's trained parameters, the kernels or all others, with holes elsewhere."""

        def one(path: Any, leaf: jax.Array) -> jax.Array | None:
            return _of_chunk(leaf, row.chunk) if _is_kernel(path) == kernels else None

        return jax.tree.map_with_path(one, self.trained)

    def _input(self, at: _Tick) -> jax.Array:
        waiting = at.parts[self.stack.part]
        return jax.lax.cond(at.first, lambda: self.stack.enter(self.rest.open(), at.batch, at.rng), lambda: waiting)

    def _layers(self, values: Params, rest: Params, x: jax.Array, parts: Parts, at: _Tick) -> jax.Array:
        before = (at.chunk * self.stages + self.stage) * self._layers_a_chunk
        block = self.stack.block(rest, parts, at.batch, at.rng)
        return self.runner(lambda layer, index, x, slot: block(layer, before + index, x, slot), values, x)[0]

    def _defer(self, values: Params, factors: Params) -> Params:
        def one(axes: Any, leaf: Any, factor: Factors | None) -> Any:
            return leaf if factor is None else Deferred(leaf, factor)

        return jax.tree.map(one, self.region.axes, values, factors, is_leaf=_is_axes)

    def _uses(self) -> dict[str, deferred.Use]:
        """How the kernels are used, by name."""
        notes = Notes()

        def one(path: Any, leaf: jax.Array) -> Any:
            return Probe(leaf, tree.path_name(path), notes) if _is_kernel(path) else leaf

        def trace(x: jax.Array, parts: Parts) -> jax.Array:
            values = jax.tree.map_with_path(one, jax.tree.map(lambda leaf: leaf[0], self.params))
            at = _Tick(self._first_batch(), self.rng, parts, values, jnp.int32(0), jnp.bool_(True), jnp.bool_(True))
            return self._layers(values, self.rest.open(), x, parts, at)

        jax.eval_shape(trace, self.entered(), self.parts)
        return notes.uses

    def _loss(self, rest: Params, x: jax.Array, at: _Tick) -> tuple[Mean, Metrics]:
        return self._loss_of(rest, x, at.batch)

    def _loss_of(self, rest: Params, x: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        return self.objective.of_hidden(self.stack.leave(rest, x), self.model.head(rest), batch)

    def _end(self, carry: Carry, x: jax.Array, dy: jax.Array, at: _Tick) -> tuple[jax.Array, Carry]:
        """The gradient of what left the layers, where they are the stack's last also through what follows them there."""

        def leave(given: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
            dy, carry = given
            _, back = jax.vjp(lambda watched, x: self.stack.leave(self.rest.open(watched), x), self.rest.watched, x)
            drest, dx = back(dy)
            return dx, carry._replace(rest=_add(carry.rest, drest))

        def loss(given: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
            _, carry = given

            def total(watched: Params, x: jax.Array) -> tuple[jax.Array, tuple[Mean, Metrics]]:
                mean, metrics = self._loss(self.rest.open(watched), x, at)
                return mean.total, (mean, metrics)

            _, back, found = jax.vjp(total, self.rest.watched, x, has_aux=True)
            drest, dx = back(jnp.float32(1))
            mean, metrics = _add((carry.mean, carry.metrics), found)
            return dx, carry._replace(rest=_add(carry.rest, drest), mean=mean, metrics=metrics)

        return once(at.last, loss if self.ends else leave, (dy, carry))

    def _begin(self, carry: Carry, dx: jax.Array, at: _Tick) -> Carry:
        """The gradient of what stands before the stack's first layers."""

        def enter(carry: Carry) -> Carry:
            _, back = jax.vjp(lambda watched: self.stack.enter(self.rest.open(watched), at.batch, at.rng), self.rest.watched)
            return carry._replace(rest=_add(carry.rest, back(dx)[0]))

        return once(at.first, enter, carry)


def once(wanted: jax.Array, function: Callable[[Any], Any], value: Any) -> Any:
    """function(value) if wanted, else value.

    A loop of one round or none, because its result lies where its value lay. That of a condition does not: XLA would copy all sums of
    gradients in each tick.
    """
    return jax.lax.fori_loop(0, wanted.astype(jnp.int32), lambda _, value: function(value), value)


def put(held: Any, slot: jax.Array, values: Any) -> Any:
    """`held` [slots, ...] with these values in a slot; unchanged for slot -1."""

    def one(held: jax.Array, value: jax.Array) -> jax.Array:
        return held.at[jnp.where(slot < 0, held.shape[0], slot)].set(value, mode="drop")

    return jax.tree.map(one, held, values)


def _read(held: jax.Array, slot: jax.Array) -> jax.Array:
    """What is in a slot; of slot -1 something that is not used."""
    return jax.lax.dynamic_index_in_dim(held, jnp.maximum(slot, 0), keepdims=False)


def _of_chunk(leaf: jax.Array, chunk: jax.Array) -> jax.Array:
    """Of [V, ...]; where there is only one, not a copy."""
    return leaf[0] if leaf.shape[0] == 1 else leaf[chunk]


def _add(sums: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, sums, more)


def _add_at(sums: Params, chunk: jax.Array, more: Params) -> Params:
    """`sums` [V, ...] with what is there of `more` added to a chunk."""

    def one(sum: Any, part: Any) -> Any:
        return sum if part is None else sum.at[chunk].add(part)

    return jax.tree.map(one, sums, more, is_leaf=lambda node: node is None)


def _with(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _is_kernel(path: Any) -> bool:
    """Whether a parameter is multiplied by transforms/leaf.py."""
    return tree.path_name(path).endswith("kernel")
