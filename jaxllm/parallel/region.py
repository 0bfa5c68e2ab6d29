"""The region of a step that each device runs by itself, on its own rows, stage of layers and part of rows: what travels is written here.

Inside, a function sees a device's share of every array, cut over pipe, data, fsdp and seq. `tensor` alone is left to the compiler. Losses
and gradients are sums of a device's own tokens until `total` adds them up, once a step, however many micro-batches there were.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.parallel import gather, rules
from jaxllm.parallel.constrain import SPREAD
from jaxllm.parallel.plan import Plan
from jaxllm.transforms import tree
from jaxllm.types import Axes, Batch, Params

BY_HAND = tuple(axis for axis in rules.MESH_AXES if axis != gather.AUTO)


@dataclass(frozen=True)
class Region:
    """The region of models whose parameters have these axes, on the mesh of a plan. `stacks`: where their layers are."""

    plan: Plan
    axes: Any
    stacks: tuple[tuple[str, ...], ...]

    def run(self, function: Callable[..., Any], params: Sequence[Params], batch: Batch, *rest: Any, out: Any) -> Any:
        """function(*params, batch, *rest) on each device. `rest` is the same on all; `out`: specs of the results, a tree or its trunk."""
        if self.plan.mesh.size == 1:
            return function(*params, batch, *rest)
        rows, same = self.plan.batch_sharding().spec, PartitionSpec()
        in_specs = (*map(self.specs, params), jax.tree.map(lambda _: rows, batch), *[jax.tree.map(lambda _: same, x) for x in rest])
        # The gradients of what is whole on several devices are summed by `total`, not by the shard_map: hence no check.
        each = jax.shard_map(
            function, mesh=self.plan.mesh, in_specs=in_specs, out_specs=out, axis_names=set(BY_HAND), check_vma=False
        )
        return each(*params, batch, *rest)

    def gradient_specs(self, params: Params) -> Any:
        """Of each gradient that leaves the region, how it is cut by hand."""
        return self._specs(params, self.plan.tables.state)

    def specs(self, params: Params) -> Any:
        """Of each parameter, how it is cut by hand."""
        return self._specs(params, self.plan.tables.parameters)

    def _specs(self, params: Params, table: rules.Rules) -> Any:

        def one(axes: Axes) -> PartitionSpec:
            return PartitionSpec(*(rules.entry(tuple(name for name in table[axis] if name in BY_HAND)) for axis in axes))

        return self.map(lambda axes, leaf: one(axes), params)

    def watch(self, params: Params) -> Params:
        """What the loss is differentiated with respect to: the parameters, or zeros in the shape of a device's share (ZeRO-2)."""

        def one(axes: Axes, leaf: jax.Array) -> jax.Array:
            how = self._how_tapped(axes)
            if how is None:
                return leaf
            shape = list(leaf.shape)
            shape[how.dimension] //= _size(self.plan, how.over)
            return jnp.zeros(shape, leaf.dtype)

        return self.map(one, params)

    def attach(self, params: Params, watched: Params) -> Params:
        """All parameters, those that are watched as functions of it."""

        def one(axes: Axes, leaf: jax.Array, watched: jax.Array | None) -> Any:
            if watched is None:
                return leaf
            return watched if self._how_tapped(axes) is None else gather.Tapped(leaf, watched)

        return self.map(one, params, watched)

    def open(self, params: Params) -> Params:
        """The parameters as a model takes them: all but those of layers made whole."""
        opened = self.plan.constrain.gather(self.rest(params), self.rest(self.axes))
        for path in self.stacks:
            tree.put(opened, path, tree.get(params, path))
        return opened

    def rest(self, params: Params) -> Params:
        """The parameters outside the layers."""
        for path in self.stacks:
            params = tree.without(params, path)
        return params

    def tie(self, held: Any, batch: Batch) -> tuple[Any, Batch]:
        """Both, the parameters as if they depended on the micro-batch: else the compiler gathers those of all layers beforehand."""
        if self.plan.mesh.shape["fsdp"] == 1:
            return held, batch
        return jax.lax.optimization_barrier((held, batch))

    def fold(self, rng: jax.Array | None) -> jax.Array | None:
        """A key of this device's own."""
        names = tuple(axis for axis in SPREAD if self.plan.mesh.shape[axis] > 1)
        return rng if rng is None or not names else jax.random.fold_in(rng, jax.lax.axis_index(names))

    def sum(self, values: Any, over: tuple[str, ...] = SPREAD) -> Any:
        """The sum of all devices' values."""
        names = tuple(axis for axis in over if self.plan.mesh.shape[axis] > 1)
        return jax.lax.psum(values, names) if names else values

    def total(self, gradients: Params) -> Params:
        """The sum of all devices' gradients, cut as the table of state says."""

        def one(axes: Axes, gradient: jax.Array) -> jax.Array:
            mesh = self.plan.mesh.shape
            tapped, shared = self._how_tapped(axes), self._how_shared(axes)
            over = [axis for axis in SPREAD if mesh[axis] > 1 and not (tapped and axis == "fsdp")]
            mine = [name for axis in axes for name in self.plan.tables.parameters[axis] if name in BY_HAND]
            if tapped is None and shared is not None:  # ZeRO-1
                gradient = gather.share(gradient, shared)
                over.remove("fsdp")
            over = [axis for axis in over if axis not in mine]
            return jax.lax.psum(gradient, tuple(over)) if over else gradient

        return self.map(one, gradients)

    def cut(self, axes: Axes, gradient: jax.Array) -> jax.Array:
        """The gradient of a whole parameter, summed over fsdp and cut up where gradients are cut while they are summed (ZeRO-2 and 3)."""
        if self.plan.parallel.zero_stage == 1:
            return gradient
        how = gather.how(axes, self.plan.tables.state, self.plan.mesh.shape, ("fsdp",))
        return gradient if how is None else gather.share(gradient, how)

    def narrow(self, params: Params) -> Params:
        """Outside the region: parameters or gradients laid out by the table of state, as the optimizer works on them."""
        return self._lay(params, self.plan.tables.state)

    def widen(self, params: Params) -> Params:
        """Outside the region: parameters laid out by their own table again."""
        return self._lay(params, self.plan.tables.parameters)

    def _lay(self, params: Params, table: rules.Rules) -> Params:
        if self.plan.mesh.size == 1:
            return params

        def one(axes: Axes, leaf: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, self.plan.sharding(axes, leaf.shape, "a parameter", table))

        return self.map(one, params)

    def _how_tapped(self, axes: Axes) -> gather.How | None:
        """How the gradient of a parameter is cut while it is summed up, where the parameter itself is whole (ZeRO-2)."""
        return self._how_shared(axes) if self.plan.parallel.zero_stage == 2 else None

    def _how_shared(self, axes: Axes) -> gather.How | None:
        """How the optimizer state of a parameter is cut over fsdp, where the parameter itself is whole (ZeRO-1 and 2)."""
        if self.plan.parallel.zero_stage == 3:
            return None
        return gather.how(axes, self.plan.tables.state, self.plan.mesh.shape, ("fsdp",))

    def map(self, function: Callable[..., Any], params: Params, *more: Params) -> Any:
        """function(axes, leaf, ...) of each parameter; holes stay holes."""

        def one(axes: Axes, leaf: Any, *others: Any) -> Any:
            return None if leaf is None else function(axes, leaf, *others)

        return jax.tree.map(one, self.axes, params, *more, is_leaf=lambda node: isinstance(node, tuple))


def _size(plan: Plan, names: tuple[str, ...]) -> int:
    size = 1
    for name in names:
        size *= plan.mesh.shape[name]
    return size
