"""The product of activations and a dense kernel."""

import math

import jax
import jax.numpy as jnp


def product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, kernel)` in x.dtype: master weights are float32, compute may be narrower.

    Where the last axes of x meet the first ones of the kernel, in order, both are folded into matrices: the gradient of a kernel
    over two batch axes makes XLA's CPU backend transpose its operands, which took a quarter of a small model's step.
    """
    kernel = kernel.astype(x.dtype)
    inputs, _, result = spec.partition("->")
    x_axes, kernel_axes = inputs.split(",")
    summed = sum(axis in kernel_axes for axis in x_axes)
    kept = len(x_axes) - summed
    if x_axes[kept:] != kernel_axes[:summed] or result != x_axes[:kept] + kernel_axes[summed:]:
        return jnp.einsum(spec, x, kernel)
    rows, width = math.prod(x.shape[:kept]), math.prod(x.shape[kept:])
    return (x.reshape(rows, width) @ kernel.reshape(width, -1)).reshape(*x.shape[:kept], *kernel.shape[summed:])
