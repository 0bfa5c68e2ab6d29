"""Gradients of an objective for a whole batch: sums over micro-batches and devices, not divided by anything yet."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.engine.state import TrainState
from jaxllm.parallel import pipeline
from jaxllm.parallel.region import Region
from jaxllm.transforms import tree
from jaxllm.types import Batch, Mean, Metrics, Model, Objective, Params


class Sums(NamedTuple):
    """Gradients of the total of `mean`, which is what is minimized, and the metrics: all of them sums, so they add."""

    gradients: Params
    mean: Mean
    metrics: Metrics


class Held(NamedTuple):
    """Of a training state, what a gradient depends on. loss_scale: of float16, or None."""

    params: Params
    frozen: Params
    loss_scale: jax.Array | None


# (state, batch, key for dropout or None) -> Sums
Gradients = Callable[[TrainState, Batch, jax.Array | None], Sums]


def _specs(region: Region, params: Params) -> Any:
    """How Sums leave the region."""
    same: Any = PartitionSpec()
    return Sums(region.gradient_specs(params), same, same)


def _held(state: TrainState) -> Held:
    return Held(state.params, state.frozen, None if state.loss_scale is None else state.loss_scale.scale)


def make(objective: Objective, model: Model, config: Any, region: Region) -> Gradients:
    """gradients(state, batch, rng) of the trainable parameters, in train.microbatches parts, on each device of the region by itself."""
    if region.plan.mesh.shape["pipe"] > 1:
        return _pipelined(objective, model, config, region)

    def own(params: Params, frozen: Params, batch: Batch, rng: jax.Array | None, loss_scale: jax.Array | None) -> Sums:
        one = partial(_differentiate, objective, region, Held(params, frozen, loss_scale))
        found = _accumulate(one, batch, region.fold(rng), config.train.microbatches)
        return Sums(region.total(found.gradients), *region.sum((found.mean, found.metrics)))

    def gradients(state: TrainState, batch: Batch, rng: jax.Array | None) -> Sums:
        params, frozen, scale = _held(state)
        out = _specs(region, params)
        found = region.run(own, (params, frozen), batch, rng, scale, out=out)
        return found._replace(gradients=region.narrow(found.gradients))

    return gradients


def _pipelined(objective: Objective, model: Model, config: Any, region: Region) -> Gradients:
    """The same, the micro-batches passing through the stages of a pipeline."""
    interpreter, chunks = pipeline.make(model, objective, config, region)

    def own(params: Params, frozen: Params, batch: Batch, rng: jax.Array | None) -> Sums:
        gradients, mean, metrics = interpreter.run(params, frozen, batch, region.fold(rng))
        return Sums(gradients, *region.sum((mean, metrics)))

    def gradients(state: TrainState, batch: Batch, rng: jax.Array | None) -> Sums:
        params, frozen = chunks.cut(state.params), chunks.cut(state.frozen)
        out = _specs(chunks.region, params)
        found = chunks.region.run(own, (params, frozen), batch, rng, out=out)
        return found._replace(gradients=region.narrow(chunks.join(found.gradients)))

    return gradients


def _differentiate(objective: Objective, region: Region, held: Held, batch: Batch, rng: jax.Array | None) -> Sums:
    """Sums of one micro-batch. Float16 goes back through the model as the scaled mean, whose size does not grow with the batch."""
    held, batch = region.tie(held, batch)

    def total(watched: Params) -> tuple[jax.Array, tuple[Mean, Metrics]]:
        params = region.open(region.attach(tree.combine(held.params, held.frozen), watched))
        mean, metrics = objective(params, batch, rng)
        return mean.total, (mean, metrics)

    _, backward, (mean, metrics) = jax.vjp(total, region.watch(held.params), has_aux=True)
    if held.loss_scale is None:
        (gradients,) = backward(jnp.ones_like(mean.total))
        return Sums(gradients, mean, metrics)
    # The weight of all devices: what layers gather is summed over them on the way back, so all must scale alike.
    factor = held.loss_scale / jnp.maximum(region.sum(mean.weight), 1.0)
    (gradients,) = backward(factor)
    return Sums(jax.tree.map(lambda gradient: gradient / factor, gradients), mean, metrics)


def _accumulate(sums: Callable[[Batch, jax.Array | None], Sums], batch: Batch, rng: jax.Array | None, microbatches: int) -> Sums:
    """`sums` of the whole batch, a micro-batch at a time. Rows i, i + M, i + 2M ... make up one of M."""
    if microbatches == 1:
        return sums(batch, rng)
    parts = {name: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

    def body(so_far: Sums, part: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
        microbatch, index = part
        more = sums(microbatch, None if rng is None else jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, so_far, more), None

    shapes = jax.eval_shape(sums, {name: x[0] for name, x in parts.items()}, rng)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(body, zeros, (parts, jnp.arange(microbatches)))[0]
