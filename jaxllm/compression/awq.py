"""AWQ: inputs that activations make important are scaled up before rounding (Lin et al. 2023, arXiv:2306.00978).

An input scaled by s has its weights rounded 1 / s as coarsely against what it carries, as long as the scale of its group stays. The search
is over s = mean|x|^alpha (eq. 5), alpha from 0, which changes nothing, to 1.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.compression import grid as grids
from jaxllm.transforms.affine import Grid

STEPS = 20


def candidates(absolute_I: jax.Array) -> jax.Array:
    """[STEPS, I]: mean|x|^alpha for alpha 0, 0.05, ..., with the product of the largest and the smallest 1, as the authors' program has it.

    absolute_I: mean |x| of each input.
    """
    alphas = jnp.arange(STEPS)[:, None] / STEPS
    scales = jnp.maximum(jnp.maximum(absolute_I, 1e-30) ** alphas, 1e-4)
    return scales / jnp.sqrt(scales.max(1, keepdims=True) * scales.min(1, keepdims=True))


@partial(jax.jit, static_argnames="grid")
def rounded(kernel_IO: jax.Array, s_I: jax.Array, grid: Grid) -> jax.Array:
    """Q(s W) / s, float32 [I, O]: what the scaled inputs' kernel does, rounded to the nearest."""
    scaled = kernel_IO * s_I[:, None]
    return grids.round_to_nearest(scaled, grid).dense(grid) / s_I[:, None]


def linear_loss(kernel_IO: jax.Array, hessian_II: jax.Array, grid: Grid) -> Callable[[jax.Array], jax.Array]:
    """loss(s): the squared error of the kernel's own outputs."""
    return lambda s_I: grids.squared_error(kernel_IO, rounded(kernel_IO, s_I, grid), hessian_II)


def harmless(scales: jax.Array, losses: Sequence[Callable[[jax.Array], jax.Array]]) -> jax.Array:
    """The rows of `scales` with which no loss is larger than with the first row, which stays: kernels that share their inputs share scales,
    and what is best for all of them together may be bad for one."""
    found = jnp.stack([jnp.stack([loss(each) for loss in losses]) for each in scales])
    return scales[(found <= found[0]).all(1).at[0].set(True)]


def search(scales: jax.Array, loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The row of `scales` with the least loss; a loss that is NaN is never the least."""
    losses = jnp.stack([loss(each) for each in scales])
    return scales[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))]
