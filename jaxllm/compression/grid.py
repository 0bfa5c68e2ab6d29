"""Codes of a matrix: the result of every method, and the simplest method.

A kernel is here the matrix [I, O] of its inputs and outputs, however many axes these have in the model.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.transforms import affine, quantized
from jaxllm.transforms.affine import Grid
from jaxllm.transforms.int8 import Int8

# Shares of the range of a group that a clip search tries.
SHARES = jnp.linspace(1.0, 0.5, 20, endpoint=False)


class Rounded(NamedTuple):
    """codes: uint8 [I, O]. scale: [G, O], of the grid's scale_dtype. zero: uint8 [G, O], or None for the middle code.

    groups: int32 [I], the group of each input, or None: runs of I / G inputs.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    groups: jax.Array | None

    def dense(self, grid: Grid) -> jax.Array:
        """float32 [I, O]."""
        inputs, count = len(self.codes), len(self.scale)
        index = jnp.arange(inputs) // (inputs // count) if self.groups is None else self.groups
        zero = grid.middle if self.zero is None else self.zero.astype(jnp.float32)[index]
        return (self.codes.astype(jnp.float32) - zero) * self.scale.astype(jnp.float32)[index]


def matrix(kernel: jax.Array, inputs: int) -> jax.Array:
    """[I, O] of a kernel whose first `inputs` axes are summed over, float32."""
    return kernel.astype(jnp.float32).reshape(math.prod(kernel.shape[:inputs]), -1)


@partial(jax.jit, static_argnames=("shape", "inputs", "grid", "rounds"))
def leaf(rounded: Rounded, shape: tuple[int, ...], inputs: int, grid: Grid, rounds: bool = False) -> Any:
    """The leaf type of a kernel of this shape: `Int8` for 8 bits with one symmetric scale an output, else `Affine`. rounds: of Int8."""
    if grid.bits == 8 and not grid.group and grid.symmetric and not grid.ordered:
        codes = (rounded.codes.astype(jnp.int32) - grid.middle).astype(jnp.int8).reshape(shape)
        return Int8(codes, rounded.scale.astype(jnp.float32).reshape((1,) * inputs + shape[inputs:]), rounds)
    scales = (-1, *shape[inputs:]) if grid.ordered else affine.group_shape(shape, inputs, grid)
    zero = None if rounded.zero is None else rounded.zero.reshape(scales)
    return affine.of_codes(rounded.codes.reshape(shape), rounded.scale.reshape(scales), zero, inputs, grid, rounded.groups)


@partial(jax.jit, static_argnames="grid")
def round_to_nearest(kernel_IO: jax.Array, grid: Grid) -> Rounded:
    """Each weight to the nearest code of its group."""
    return with_limits(kernel_IO, *affine.limits(kernel_IO, grid, scale_shape(kernel_IO, grid)), grid)


def with_limits(kernel_IO: jax.Array, low_GO: jax.Array, high_GO: jax.Array, grid: Grid) -> Rounded:
    """To the nearest code, where the codes of each group reach from `low_GO` to `high_GO`; what lies beyond goes to the last code."""
    scale, zero = affine.scales(low_GO, high_GO, grid)
    spread_zero = None if zero is None else quantized.spread(zero, kernel_IO.shape)
    codes = affine.nearest(kernel_IO, quantized.spread(scale, kernel_IO.shape), spread_zero, grid).astype(jnp.uint8)
    index = affine.runs(kernel_IO.shape[:1], grid) if grid.ordered else None
    return Rounded(codes, scale, zero, index)


def clip(
    kernel_IO: jax.Array, grid: Grid, shape: tuple[int, int], error: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(low, high) [G, O] of each group: 1, 0.975, ... 0.525 of the range of its weights, whichever leaves the least error; of equal ones
    the widest.

    shape: (G, O). error: [G, O] of the difference between weights and nearest codes, [G, I / G, O].
    """
    low, high = affine.limits(kernel_IO, grid, shape)

    def of(share: jax.Array) -> jax.Array:
        off = kernel_IO - with_limits(kernel_IO, low * share, high * share, grid).dense(grid)
        return error(off.reshape(shape[0], -1, shape[1]))

    share_GO = SHARES[jnp.argmin(jax.lax.map(of, SHARES), axis=0)]
    return low * share_GO, high * share_GO


@partial(jax.jit, static_argnames="grid")
def clipped(kernel_IO: jax.Array, hessian_II: jax.Array, grid: Grid) -> Rounded:
    """To the nearest code of ranges clipped to what makes the smallest error of the sums over the inputs of each group (Lin et al. 2023,
    arXiv:2306.00978, section 5.1: weight clipping).

    hessian_II: the sum of x x^T. Of it the blocks of the groups count: d^T H_g d is the sum over the tokens of (x_g d)^2. Groups hang
    together, though: an output that loses by what its groups gain each by itself keeps its whole ranges.
    """
    groups, _ = shape = scale_shape(kernel_IO, grid)
    size = len(kernel_IO) // groups
    blocks_G = jnp.stack([hessian_II[start : start + size, start : start + size] for start in range(0, len(kernel_IO), size)])
    whole = affine.limits(kernel_IO, grid, shape)
    fitted = clip(kernel_IO, grid, shape, lambda off: jnp.einsum("gio,gij,gjo->go", off, blocks_G, off, precision="highest"))

    def errors(limits: tuple[jax.Array, jax.Array]) -> jax.Array:
        return output_errors(kernel_IO - with_limits(kernel_IO, *limits, grid).dense(grid), hessian_II)

    loses_O = errors(fitted) > errors(whole)
    low, high = (jnp.where(loses_O, wide, narrow) for wide, narrow in zip(whole, fitted, strict=True))
    return with_limits(kernel_IO, low, high, grid)


def scale_shape(kernel_IO: jax.Array, grid: Grid) -> tuple[int, int]:
    """(G, O) of scales; ValueError if groups of this size do not make up the inputs."""
    inputs, outputs = kernel_IO.shape
    affine.group_shape(kernel_IO.shape, 1, grid)  # which refuses groups that do not fit
    return inputs // (grid.group or inputs), outputs


@jax.jit
def squared_error(kernel_IO: jax.Array, other_IO: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """The sum over tokens and outputs of (x W - x V)^2: tr(D^T H D), D = W - V, H the sum of x x^T."""
    return jnp.sum(output_errors(kernel_IO - other_IO, hessian_II))


def output_errors(off_IO: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """[O]: the sum over tokens of (x d)^2 for each output, d^T H d."""
    return jnp.sum(off_IO * jnp.matmul(hessian_II, off_IO, precision="highest"), axis=0)


def relative_error(kernel_IO: jax.Array, other_IO: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """||x W - x V|| / ||x W|| over the tokens."""
    whole = squared_error(kernel_IO, jnp.zeros_like(kernel_IO), hessian_II)
    return jnp.sqrt(squared_error(kernel_IO, other_IO, hessian_II) / jnp.maximum(whole, 1e-30))
