"""Kernels in 4 bits: groups of inputs share a symmetric scale, their largest weight / 7.5, as in the GPTQ and compressed-tensors files."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.transforms import quantized
from jaxllm.types import Axes, Transform


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("axis", "kind"))
@dataclasses.dataclass(frozen=True)
class Int4(quantized.Quantized):
    """(code - 8) x scale.

    codes: uint8, two a byte along `axis`, the last input axis: the first in the low half, so that four bytes are a little-endian word of
        eight codes as those files have it. A code is the weight in scales, -8 to 7, plus 8.
    scale: float32, of the dense kernel's rank; its input axes count the groups.
    """

    codes: Any
    scale: Any
    axis: int
    kind: str = "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        return quantized.unpacked_shape(self.codes, self.axis)

    def dense(self) -> jax.Array:
        codes = quantized.unpack(self.codes, self.axis, quantized.LOW_FIRST)
        return (codes.astype(jnp.float32) - 8) * quantized.spread(self.scale, self.shape)


def quantize(kernel: Any, inputs: int, group: int) -> Int4:
    """The kernel of one layer, whose first `inputs` axes are summed over. A group without weights has the scale 0.

    ValueError if runs of `group` inputs, in row-major order, do not make up the kernel.
    """
    kernel = quantized.array(kernel)
    scales = quantized.scale_shape(kernel.shape, inputs, group)
    if scales is None:
        every = math.prod(kernel.shape[:inputs])
        sizes = [size for size in range(2, every + 1) if quantized.scale_shape(kernel.shape, inputs, size)]
        accepted = ", ".join(map(str, sizes)) or "none, since two codes share a byte and the last input axis is odd"
        raise ValueError(
            f"quant.group = {group} does not cut the inputs {kernel.shape[:inputs]} of a kernel of shape {kernel.shape} into groups.\n"
            f"  Accepted for it: {accepted}.\n  Change quant.group, or leave such kernels out of quant.targets."
        )
    scale = quantized.largest(kernel, scales) / 7.5
    steps = kernel / quantized.spread(jnp.where(scale > 0, scale, 1), kernel.shape)
    # The largest weight lies between two steps, at 7.5. A hair more, and it goes to the outer one, -8, in every program, however the
    # compiler rounds these quotients.
    steps = jnp.clip(jnp.round(steps * (1 + 2.0**-20)), -8, 7)
    axis = quantized.packed_axis(kernel, inputs)
    return Int4(quantized.pack(steps + 8, axis, quantized.LOW_FIRST), scale, axis)


def make(config: ConfigDict) -> Transform:
    group = config.quant.group

    def axes(axes: Axes, inputs: int) -> Int4:
        return Int4(axes, quantized.scale_axes(axes, inputs), inputs - 1 - len(axes))

    return Transform(config.quant.targets, lambda kernel, inputs, rng: quantize(kernel, inputs, group), axes)
