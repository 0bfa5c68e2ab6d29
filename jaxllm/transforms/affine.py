"""Kernels in 2, 3, 4 or 8 bits on grids of equal steps: w = (code - zero) x scale, as in the files of GPTQ, AWQ and compressed-tensors.

A group of inputs shares the scale and the zero of each output. Symmetric: the zero is the middle code, and the scale the largest weight of
the group / 7.5 (with 4 bits). Asymmetric: the codes span the weights of the group and 0, which is a code. Rounding to the nearest code is
what the transforms do; other ways of finding codes are in jaxllm/compression.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.transforms import quantized
from jaxllm.types import Axes, Transform


class Grid(NamedTuple):
    """How kernels are rounded.

    group: inputs that share a scale, 0 for all. ordered: an index says which group an input belongs to; else they are runs of
    neighbours, in row-major order. scale_dtype: that of the scales, which are rounded to it before the codes are found.
    """

    bits: int
    group: int
    symmetric: bool = True
    ordered: bool = False
    scale_dtype: str = "float32"

    @property
    def codes(self) -> int:
        """How many there are."""
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale", "zero", "groups"), meta_fields=("axis", "bits", "kind"))
@dataclasses.dataclass(frozen=True)
class Affine(quantized.Quantized):
    """(code - zero) x scale.

    codes: uint8, packed along `axis`, the last input axis, as `quantized.pack` does.
    scale: of the dense kernel's rank; its input axes count the groups.
    zero: uint8 of that shape, or None for the middle code.
    groups: int32 [inputs...], the group of each input, counted along the last input axis of `scale`, whose other ones are 1; or None, where
        groups are runs.
    """

    codes: Any
    scale: Any
    zero: Any
    groups: Any
    axis: int
    bits: int
    kind: str = "affine"

    @property
    def form(self) -> str:
        return f"int{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return quantized.unpacked_shape(self.codes, self.axis, self.bits)

    def dense(self) -> jax.Array:
        codes = quantized.unpack(self.codes, self.axis, self.bits).astype(jnp.float32)
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self._spread(self.zero)
        return (codes - zero) * self._spread(self.scale)

    def _spread(self, x: jax.Array) -> jax.Array:
        """What groups share, for each weight: float32 of the dense kernel's shape."""
        if self.groups is None:
            return quantized.spread(x.astype(jnp.float32), self.shape)
        index = self.groups.reshape(*self.groups.shape, *(1,) * (-self.axis - 1))
        return jnp.take_along_axis(x.astype(jnp.float32), index, axis=self.axis)


def limits(kernel: jax.Array, grid: Grid, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(lowest, highest) weight that the codes of each group must reach; `shape` is that of the scales."""
    if grid.symmetric:
        high = quantized.largest(kernel, shape)
        return -high, high
    low, high = (quantized.over_groups(function, kernel, shape) for function in (jnp.min, jnp.max))
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def scales(low: jax.Array, high: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero) of codes that reach from `low` to `high`; the zero is uint8, None of a symmetric grid. A group without weights has
    the scale 0."""
    scale = ((high - low) / (grid.codes - 1)).astype(grid.scale_dtype)
    if grid.symmetric:
        return scale, None
    wide = scale.astype(jnp.float32)
    zero = jnp.round(-low / jnp.where(wide > 0, wide, 1))
    # Rounded to a smaller scale, the lowest weight may lie below code 0.
    return scale, jnp.clip(zero, 0, grid.codes - 1).astype(jnp.uint8)


def nearest(kernel: jax.Array, scale: jax.Array, zero: jax.Array | None, grid: Grid) -> jax.Array:
    """The code of each weight: float32 whole numbers from 0 to 2^bits - 1. scale, zero: of the shape of the weights, or one that it
    is broadcast from."""
    wide = scale.astype(jnp.float32)
    steps = kernel / jnp.where(wide > 0, wide, 1)
    if grid.symmetric:
        # The largest weight lies between two steps, at 7.5. A hair more, and it goes to the outer one, -8, in every program, however the
        # compiler rounds these quotients.
        steps = steps * (1 + 2.0**-20)
    middle = grid.middle if zero is None else zero.astype(jnp.float32)
    return jnp.clip(jnp.round(steps) + middle, 0, grid.codes - 1)


def quantize(kernel: Any, inputs: int, grid: Grid) -> Affine:
    """The kernel of one layer, whose first `inputs` axes are summed over, each weight rounded to the nearest code.

    ValueError if runs of `grid.group` inputs, in row-major order, do not make up the kernel.
    """
    kernel = quantized.array(kernel)
    shape = group_shape(kernel.shape, inputs, grid)
    scale, zero = scales(*limits(kernel, grid, shape), grid)
    spread_zero = None if zero is None else quantized.spread(zero, kernel.shape)
    codes = nearest(kernel, quantized.spread(scale, kernel.shape), spread_zero, grid)
    return of_codes(codes, scale, zero, inputs, grid)


def of_codes(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, inputs: int, grid: Grid, groups: Any = None) -> Affine:
    """The leaf of codes [inputs..., outputs...] whose scales and zeros have the shape that `group_shape` gives.

    groups: of each input, in any shape, for a grid that is ordered; None for runs.
    """
    axis = quantized.packed_axis(codes, inputs)
    packed = quantized.pack(codes, axis, grid.bits)
    if not grid.ordered:
        return Affine(packed, scale, zero, None, axis, grid.bits)
    index = _runs(codes.shape[:inputs], grid) if groups is None else groups
    index = index.reshape(codes.shape[:inputs]).astype(jnp.int32)
    ordered = (*(1,) * (inputs - 1), -1, *codes.shape[inputs:])
    return Affine(packed, scale.reshape(ordered), None if zero is None else zero.reshape(ordered), index, axis, grid.bits)


def _runs(shape: tuple[int, ...], grid: Grid) -> jax.Array:
    every = math.prod(shape)
    return jnp.arange(every) // (grid.group or every)


def group_shape(shape: tuple[int, ...], inputs: int, grid: Grid) -> tuple[int, ...]:
    """Shape of the scales of a kernel of this shape; ValueError if groups of this size do not make it up."""
    every, unit = math.prod(shape[:inputs]), quantized.unit(grid.bits)[0]
    if (found := quantized.scale_shape(shape, inputs, grid.group or every, unit)) is not None:
        return found
    sizes = [size for size in range(2, every + 1) if quantized.scale_shape(shape, inputs, size, unit)]
    none = f"none, since {unit} codes of {grid.bits} bits fill whole bytes and the last input axis is no multiple of {unit}"
    raise ValueError(
        f"quant.group = {grid.group} does not cut the inputs {shape[:inputs]} of a kernel of shape {shape} into groups.\n"
        f"  Accepted for it: {', '.join(map(str, sizes)) or none}.\n  Change quant.group, or leave such kernels out of quant.targets."
    )


def axes(axes: Axes, inputs: int, grid: Grid) -> Affine:
    """Logical axes of each array."""
    scale = quantized.scale_axes(axes, inputs)
    zero, groups = None if grid.symmetric else scale, axes[:inputs] if grid.ordered else None
    return Affine(axes, scale, zero, groups, inputs - 1 - len(axes), grid.bits)


def transform(config: ConfigDict, grid: Grid) -> Transform:
    """Rounds to the nearest."""
    return Transform(
        config.quant.targets,
        lambda kernel, inputs, rng: quantize(kernel, inputs, grid),
        lambda names, inputs: axes(names, inputs, grid),
    )


def make_int4(config: ConfigDict) -> Transform:
    """4 bits as config.quant says."""
    return transform(config, grid_of(config, 4))


def make_int3(config: ConfigDict) -> Transform:
    """3 bits as config.quant says."""
    return transform(config, grid_of(config, 3))


def grid_of(config: ConfigDict, bits: int) -> Grid:
    """As config.quant says. Without a group of its own: 128, and all inputs of kernels in 8 bits."""
    quant = config.quant
    group = {-1: 0, 0: 0 if bits == 8 else 128}.get(quant.group, quant.group)
    return Grid(bits, group, quant.symmetric, quant.ordered, quant.scale_dtype)
