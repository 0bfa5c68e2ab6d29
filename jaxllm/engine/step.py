"""The one train step: gradients of an objective, clipped, through an optimizer, into a new state.

It does not know the model, the task, the mesh or the optimizer. Sums come before divisions: micro-batches and devices add gradient totals,
metric totals and weights (gradients.py), and the end divides once by the summed weight, so that no split can change the mean.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.data import examples
from jaxllm.engine import references
from jaxllm.engine.gradients import Gradients
from jaxllm.engine.state import LossScale, TrainState, random_key
from jaxllm.parallel.region import Region
from jaxllm.types import Batch, Params

Scalars = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Scalars]]


def make(
    gradients: Gradients, optimizer: optax.GradientTransformation, schedule: Callable[[Any], jax.Array], config: Any, region: Region
) -> Step:
    """step(state, batch) -> (state, metrics), pure and traceable, for the whole config.

    Metrics are float32 scalars still on the device: those of the objective divided by their weight, grad_norm (before clipping), lr,
    weight (of the whole batch) and loss_scale (float16 only); int32 skipped and skipped_in_a_row; bool finite; and
    moved: bool [trainable arrays], in the order of tree.named_leaves(state.params): whether a gradient reached the array.

    A step whose loss or gradient is not finite leaves params, opt_state and ema as they are, bit for bit, and is counted; so
    does a step of weight 0, which is not counted. `step` advances always, and with it schedule and data.
    """
    train = config.train
    uses_dropout = config.model.dropout_frac > 0 or (bool(config.train.transforms) and config.lora.dropout_frac > 0)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        rng = jax.random.fold_in(random_key(config.seed, "dropout"), state.step) if uses_dropout else None
        sums, mean, metrics = gradients(state, batch, rng)
        weight = jnp.maximum(mean.weight, 1.0)
        squares = jnp.stack([jnp.sum(jnp.square(gradient)) for gradient in jax.tree.leaves(sums)])
        norm = jnp.sqrt(jnp.sum(squares)) / weight
        finite = jnp.isfinite(norm) & jnp.isfinite(mean.total)
        lr = schedule(state.step)

        def update(gradients: Params) -> tuple[Params, Any, Params | None]:
            factor = _clip_factor(norm, config.optimizer.clip_norm) / weight
            gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
            # Each device updates the parameters whose optimizer state it holds; all of them are told what came of it (ZeRO-1 and 2).
            old = region.narrow(state.params)
            updates, opt_state = optimizer.update(gradients, state.opt_state, old)
            params = jax.tree.map(lambda param, update: param + lr * update, old, updates)
            ema = None if state.ema is None else _average(train.ema_decay, state, params)
            return region.widen(params), opt_state, ema

        # Not jnp.where: with it XLA copies the whole optimizer state each step, here it writes in place as if there were no condition.
        params, opt_state, ema = jax.lax.cond(
            finite & (mean.weight > 0), update, lambda _: (state.params, state.opt_state, state.ema), sums
        )
        state = replace(_count(state, finite, config.precision), params=params, opt_state=opt_state, ema=ema)
        scalars = {name: each.total / jnp.maximum(each.weight, 1.0) for name, each in metrics.items()}
        scalars |= {"grad_norm": norm, "lr": lr, "weight": mean.weight, "finite": finite, "moved": squares > 0}
        scalars |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        if state.loss_scale is not None:
            scalars["loss_scale"] = state.loss_scale.scale
        return state, scalars

    return step


def _clip_factor(norm: jax.Array, clip_norm: float) -> jax.Array | float:
    """What shortens a gradient of this norm to clip_norm if it is longer (Pascanu et al. 2013, arXiv:1211.5063, alg. 1); 0: never."""
    return jnp.where(norm > clip_norm, clip_norm / norm, 1.0) if clip_norm else 1.0


def _average(decay: float, state: TrainState, params: Params) -> Params:
    """The moving average after update t = 1, 2, ... decays by min(decay, t / (t + 9)): the initial weights, which are noise, soon fade."""
    updates = (state.step - state.skipped).astype(jnp.float32) + 1
    kept = jnp.minimum(decay, updates / (updates + 9))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, state.ema, params)


def _count(state: TrainState, finite: jax.Array, precision: Any) -> TrainState:
    """The counters and the loss scale after a step.

    While the scale of float16 is above 1, an overflow is its business: it halves, and skipped_in_a_row stays. It doubles after so many
    finite steps (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
    """
    failed = ~finite
    blamed, loss_scale = failed, None
    if state.loss_scale is not None:
        scale, finite_steps = state.loss_scale.scale, state.loss_scale.finite_steps + 1
        blamed = failed & (scale <= 1.0)
        grown = finite_steps >= precision.loss_scale_growth_steps
        after = jnp.where(failed, jnp.maximum(scale / 2, 1.0), jnp.where(grown, scale * 2, scale))
        loss_scale = LossScale(after, jnp.where(failed | grown, 0, finite_steps))
    return replace(
        state,
        step=state.step + 1,
        loss_scale=loss_scale,
        skipped=state.skipped + failed,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + blamed),
    )


@dataclass(frozen=True)
class Compiled:
    """A step compiled for one state and one batch layout. Bytes are per device and the compiler's own figures.

    peak_bytes: arguments + temporaries + outputs that are not written over an argument. flops: as XLA counts them, a scan body
    once; 0 where it does not, as for GPUs that are not there.
    """

    executable: Any
    compile_secs: float
    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    peak_bytes: int
    flops: float

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        """One step. The buffers of `state` are given away: it must not be used again."""
        return self.executable(state, batch)


def compile(step: Step, state: TrainState, batch: Any) -> Compiled:
    """`step` compiled ahead of time for this abstract state (state.abstract with a plan) and batch (abstract_batch).

    The new state lies where the old one lay and in its memory; metrics are replicated.
    """
    began = time.perf_counter()
    executable = lower(step, state, batch).compile()
    memory: Any = executable.memory_analysis()
    costs: Any = executable.cost_analysis()
    return Compiled(
        executable=executable,
        compile_secs=time.perf_counter() - began,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=(costs or {}).get("flops", 0.0),
    )


def lower(step: Step, state: TrainState, batch: Any) -> jax.stages.Lowered:
    """`step`, traced for this abstract state and batch; what `compile` compiles."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step)).lower(state, batch)


def abstract_batch(config: Any, plan: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The training batch of a config as ShapeDtypeStructs with the plan's sharding."""
    rows, sharding = config.train.batch_seqs, plan.batch_sharding()
    arrays = {**examples.make(config).arrays, **references.arrays(config)}
    return {name: jax.ShapeDtypeStruct((rows, array.width), array.dtype, sharding=sharding) for name, array in arrays.items()}
