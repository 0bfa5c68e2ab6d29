"""Learning rate as a function of the step.

Each schedule takes (config.schedule, peak, steps) and returns `f(step) -> learning rate`, a float32 scalar that may be traced.
`step` n is the number of updates already done: the first update uses f(0), the last one f(steps - 1).

All warm up the same way: f(n) = peak (n + 1) / (warmup_steps + 1) for n < warmup_steps, so that the first update is not lost
and f(warmup_steps) = peak. Linear, cosine and wsd are at end_frac * peak exactly on the last step.
`cosine` with steps = max_iters + 1 is the schedule of nanoGPT with lr_decay_iters = max_iters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import registry

Schedule = Callable[[Any], jax.Array]


def make(config: Any) -> Schedule:
    """The schedule of the whole config; ValueError if its warm-up does not fit into train.steps."""
    schedule, steps = config.schedule, config.train.steps
    if schedule.warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps = {schedule.warmup_steps} is not less than train.steps = {steps}: the learning rate would never"
            f" reach its peak.\n  Accepted: 0 to {steps - 1}. Set schedule.warmup_steps, or train for more steps."
        )
    return registry.resolve("schedule", schedule.name)(schedule, config.optimizer.learning_rate, steps)


def constant(schedule: Any, peak: float, steps: int) -> Schedule:
    """Stays at the peak; end_frac has no meaning here."""
    del steps
    return _warmed_up(schedule.warmup_steps, peak, jnp.ones_like)


def linear(schedule: Any, peak: float, steps: int) -> Schedule:
    """A straight line from the peak to end_frac * peak."""
    done_frac = _progress(schedule.warmup_steps, steps)
    return _warmed_up(schedule.warmup_steps, peak, lambda n: _between(schedule.end_frac, 1.0 - done_frac(n)))


def cosine(schedule: Any, peak: float, steps: int) -> Schedule:
    """Half a cosine from the peak to end_frac * peak (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, no restart)."""
    done_frac = _progress(schedule.warmup_steps, steps)
    return _warmed_up(
        schedule.warmup_steps, peak, lambda n: _between(schedule.end_frac, 0.5 * (1.0 + jnp.cos(jnp.pi * done_frac(n))))
    )


def wsd(schedule: Any, peak: float, steps: int) -> Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): the peak, then a straight line to end_frac * peak.

    The line takes the last round(decay_frac * steps) updates, or all that follow the warm-up if these are fewer.
    """
    decay_steps = round(schedule.decay_frac * steps)
    done_frac = _progress(max(steps - 1 - decay_steps, schedule.warmup_steps), steps)
    return _warmed_up(schedule.warmup_steps, peak, lambda n: _between(schedule.end_frac, 1.0 - done_frac(n)))


def inverse_sqrt(schedule: Any, peak: float, steps: int) -> Schedule:
    """Vaswani et al. 2017, arXiv:1706.03762, eq. 3, scaled to the peak: peak sqrt(t_w / t), t = n + 1, t_w = warmup_steps + 1.

    It ends where it ends; end_frac * peak is its floor.
    """
    del steps
    first = schedule.warmup_steps + 1.0
    return _warmed_up(schedule.warmup_steps, peak, lambda n: jnp.maximum(schedule.end_frac, jnp.sqrt(first / (n + 1.0))))


def _warmed_up(warmup_steps: int, peak: float, after_frac: Callable[[jax.Array], jax.Array]) -> Schedule:
    """peak * (the ramp before warmup_steps, `after_frac(n)` from there on)."""

    def learning_rate(step: Any) -> jax.Array:
        n = jnp.asarray(step, jnp.float32)
        return peak * jnp.where(n < warmup_steps, (n + 1.0) / (warmup_steps + 1.0), after_frac(n))

    return learning_rate


def _progress(first: int, steps: int) -> Callable[[jax.Array], jax.Array]:
    """n -> 0 up to step `first`, 1 on the last step and behind it, straight in between."""
    return lambda n: jnp.clip((n - first) / max(steps - 1 - first, 1), 0.0, 1.0)


def _between(end_frac: float, height: jax.Array) -> jax.Array:
    """end_frac where height = 0 and 1 where height = 1, without a rounding at either."""
    return height + end_frac * (1.0 - height)
