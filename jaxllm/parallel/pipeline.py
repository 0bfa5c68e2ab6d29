"""A pipeline: the one interpreter that runs every schedule of jaxllm/pipeline/ on the stages of a mesh.

Each device of the axis `pipe` holds a run of the layers of each chunk and does, tick by tick, what its column of the schedule's table says.
At the start of a tick activations and gradients move one stage on; then the device does one of

    forward           the layers of a chunk on a micro-batch
    backward, input   the same again, of the stored input, and the gradient with respect to the input; the kernels' gradients are put off
    backward, weight  the kernels' gradients, of what the pass before left (transforms/deferred.py)

Differentiation is by hand: nothing is kept between ticks but what the schedule's slots hold. So memory is what the schedule says it is: the
inputs of the micro-batches in flight. The stage in front also embeds, the one behind also has the head and the loss.

Letters: S stages, M micro-batches, V chunks a device, K layers a chunk.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import registry
from jaxllm.models import assembly, stack
from jaxllm.parallel import fits, gather
from jaxllm.parallel.plan import Plan
from jaxllm.parallel.region import Region
from jaxllm.parallel.rules import Tables
from jaxllm.parallel.stage import Carry, Rest, Row, Stage, once, put
from jaxllm.pipeline import schedule
from jaxllm.pipeline.buffers import allocate
from jaxllm.pipeline.schedule import Backward, Op, Schedule
from jaxllm.transforms import tree
from jaxllm.types import Batch, Mean, Metrics, Model, Objective, Params


class Interpreter:
    """Runs one schedule for one model and objective. `region`: that of the parameters as `Chunks` cuts them."""

    def __init__(self, model: Model, objective: Objective, region: Region, table: Schedule):
        self._model, self._objective, self._region, self._schedule = model, objective, region, table
        self._slots, self._trains = allocate(table), table.backward is not Backward.NONE
        # A stack's share of a device's chunks.
        self._chunks = table.chunks // len(model.stacks)
        plan, arch = region.plan, model.config
        # Of one chunk, [layers, ...], and of what is outside the layers once the stages have shared it with each other.
        self._axes = [_one_chunk(tree.get(region.axes, each.path)) for each in model.stacks]
        self._outside = Region(replace(plan, tables=Tables(*map(_whole_over_pipe, plan.tables))), region.rest(region.axes), ())
        self._runners = []
        for each, axes in zip(model.stacks, self._axes, strict=True):
            count = each.layers // (table.stages * self._chunks)
            self._runners.append(stack.make("scan", count, arch.remat, assembly.gatherer(arch, plan.constrain, axes)))

    def run(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array | None) -> tuple[Params, Mean, Metrics]:
        """(gradients of params, what is minimized, metrics) of this device's rows, summed over the stages.

        Rows i, i + M, i + 2M ... make up one of M micro-batches. No gradients if the schedule has no backward passes.
        """
        batch = {name: x.reshape(-1, self._schedule.microbatches, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
        stages = self._make_stages(params, frozen, batch, rng)
        stage, rows = jax.lax.axis_index("pipe"), Row(*jnp.asarray(self._table()))
        branches = []
        for each in stages:
            branches += [each.forward, each.backward_input, each.backward_weight][: 3 if self._trains else 1]

        def tick(carry: Carry, row: Row) -> tuple[Carry, None]:
            row = Row(*(column[stage] for column in row))
            carry = self._move(carry, row)
            for number, branch in enumerate(branches, 1):
                carry = once(row.branch == number, partial(branch, row=row), carry)
            return carry, None

        carry, _ = jax.lax.scan(tick, self._start(stages, params), rows)
        mean, metrics = jax.lax.psum((carry.mean, carry.metrics), "pipe")
        return (self._gradients(carry) if self._trains else {}), mean, metrics

    def _make_stages(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array | None) -> list[Stage]:
        whole = tree.combine(params, frozen)
        rest = self._outside.map(self._share_with_stages, self._region.rest(whole))
        watched = self._outside.watch(tree.split(rest, set(tree.names(self._region.rest(params))))[0])
        same: dict[str, Any] = {
            "model": self._model,
            "objective": self._objective,
            "rest": Rest(self._outside, rest, watched),
            "batch": batch,
            "rng": rng,
            "stages": self._schedule.stages,
            "stage": jax.lax.axis_index("pipe"),
            "trains": self._trains,
        }
        stages = [Stage(**same, **self._of_stack(index, whole, params), parts={}) for index in range(len(self._model.stacks))]
        parts = {each.stack.part: each.entered() for each in stages}
        return [replace(each, parts=parts) for each in stages]

    def _of_stack(self, index: int, whole: Params, params: Params) -> dict[str, Any]:
        stacks = self._model.stacks
        return {
            "stack": stacks[index],
            "index": index,
            "ends": index == len(stacks) - 1,
            "runner": self._runners[index],
            "region": Region(self._region.plan, self._axes[index], ()),
            "params": tree.get(whole, stacks[index].path),
            "trained": tree.get(params, stacks[index].path),
        }

    def _share_with_stages(self, axes: Any, leaf: jax.Array) -> jax.Array:
        how = self._over_pipe(axes)
        return leaf if how is None else gather.whole(leaf, how)

    def _sum_over_stages(self, axes: Any, gradient: jax.Array) -> jax.Array:
        how = self._over_pipe(axes)
        return jax.lax.psum(gradient, "pipe") if how is None else gather.share(gradient, how)

    def _over_pipe(self, axes: Any) -> gather.How | None:
        plan = self._region.plan
        return gather.how(axes, plan.tables.parameters, plan.mesh.shape, ("pipe",))

    def _table(self) -> np.ndarray:
        """int32 [fields of Row, ticks, S]."""
        table, slots = self._schedule, self._slots
        operations = 3 if self._trains else 1
        branch = np.where(table.op == Op.IDLE, 0, operations * (table.chunk // self._chunks) + table.op)
        columns = [branch, table.microbatch, table.chunk % self._chunks]
        return np.stack([*columns, slots.arrive_x, slots.arrive_dy, slots.x_slot, slots.dy_slot, slots.w_slot]).astype(np.int32)

    def _start(self, stages: list[Stage], params: Params) -> Carry:
        def waiting(slots: int, shapes: Any) -> Any:
            return jax.tree.map(lambda like: jnp.zeros((max(slots, 1), *like.shape), like.dtype), shapes)

        def zeros(shapes: Any) -> Any:
            return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

        parts, slots = stages[0].parts, self._slots
        mean, metrics = zeros(stages[-1].loss_shapes())
        sums = self._trains
        layers = [tree.get(self._region.watch(params), each.stack.path) for each in stages] if sums else []
        return Carry(
            x=waiting(slots.x_slots, parts),
            dy=waiting(slots.dy_slots, parts) if sums else {},
            factors=[waiting(slots.w_slots, each.factors()) for each in stages] if sums else [],
            layers=zeros(layers),
            rest=zeros(stages[0].rest.watched) if sums else {},
            mean=mean,
            metrics=metrics,
            sent_x=zeros(parts),
            sent_dy=zeros(parts) if sums else {},
        )

    def _move(self, carry: Carry, row: Row) -> Carry:
        """What the neighbours sent at the end of the last tick, put where it waits."""
        count = self._schedule.stages

        def send(arrays: Any, by: int) -> Any:
            return jax.tree.map(lambda x: jax.lax.ppermute(x, "pipe", [(s, (s + by) % count) for s in range(count)]), arrays)

        carry = carry._replace(x=put(carry.x, row.arrive_x, send(carry.sent_x, 1)))
        return carry._replace(dy=put(carry.dy, row.arrive_dy, send(carry.sent_dy, -1)))

    def _gradients(self, carry: Carry) -> Params:
        """The gradients of all parameters, summed over the devices and cut as the table of state says."""
        found = self._outside.map(self._sum_over_stages, self._outside.total(carry.rest))
        for each, layers in zip(self._model.stacks, carry.layers, strict=True):
            own = Region(self._region.plan, tree.get(self._region.axes, each.path), ())
            tree.put(found, each.path, own.total(layers))
        return found


def make(
    model: Model, objective: Objective, config: Any, region: Region, forward_only: bool = False
) -> tuple[Interpreter, "Chunks"]:
    """The interpreter of the config's schedule (or of its forwards alone), and what cuts parameters for it."""
    chunks, made = Chunks.of(region, fits.chunks_a_stack(config)), timetable(model, config, region.plan, forward_only)
    return Interpreter(model, objective, chunks.region, made), chunks


def timetable(model: Model, config: Any, plan: Plan, forward_only: bool = False) -> Schedule:
    """The schedule that the stages of a plan go by."""
    make_schedule = schedule.forward_only if forward_only else registry.resolve("pipeline", config.parallel.schedule)
    return make_schedule(plan.mesh.shape["pipe"], config.train.microbatches, fits.chunks_a_stack(config) * len(model.stacks))


class Chunks(NamedTuple):
    """Parameters as a pipeline has them: the layers of each stack, [L, ...], as [chunks, L / chunks, ...], of which each stage has a run.

    Chunk v of stage s holds the layers that follow those of chunk v of stage s - 1. At rest a stage holds a run of all layers: with several
    chunks, parameters move between stages once a step, and gradients back.
    """

    number: int
    region: Region

    @staticmethod
    def of(region: Region, number: int) -> "Chunks":
        axes = region.axes
        for path in region.stacks:
            layers = jax.tree.map(lambda names: ("chunks", *names), tree.get(axes, path), is_leaf=_is_axes)
            axes = tree.replaced(axes, path, layers)
        return Chunks(number, Region(region.plan, axes, region.stacks))

    def cut(self, params: Params) -> Params:
        def one(axes: Any, leaf: jax.Array) -> jax.Array:
            leaf = leaf.reshape(self.number, -1, *leaf.shape[1:]) if axes[0] == "chunks" else leaf
            return jax.lax.with_sharding_constraint(leaf, self.region.plan.sharding(axes, leaf.shape, "a chunk of layers"))

        return self.region.map(one, params)

    def nothing(self, params: Params) -> Params:
        """A tree of holes only, for what is not frozen."""
        return self.region.map(lambda axes, leaf: None, params)

    def join(self, gradients: Params) -> Params:
        """The inverse of `cut`."""

        def one(axes: Any, leaf: jax.Array) -> jax.Array:
            return leaf.reshape(-1, *leaf.shape[2:]) if axes[0] == "chunks" else leaf

        return self.region.map(one, gradients)


def _one_chunk(axes: Any) -> Any:
    """The axes of one chunk."""
    return jax.tree.map(lambda names: names[1:], axes, is_leaf=_is_axes)


def _whole_over_pipe(table: Any) -> Any:
    return {axis: tuple(name for name in shared if name != "pipe" or axis == "layers") for axis, shared in table.items()}


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)
