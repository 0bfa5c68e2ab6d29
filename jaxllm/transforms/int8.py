"""Kernels in 8 bits: a symmetric scale an output, its largest weight / 127 (Dettmers et al. 2022, arXiv:2208.07339, eq. 2, by outputs)."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.transforms import affine, quantized
from jaxllm.transforms.product import product
from jaxllm.types import Axes, Transform


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Int8(quantized.Quantized):
    """codes x scale. codes: int8 in [-127, 127], of the dense kernel's shape; scale: float32, its input axes have length 1."""

    codes: Any
    scale: Any
    kind: str = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dense(self) -> jax.Array:
        return self.codes * self.scale

    def linear(self, spec: str, x: jax.Array) -> jax.Array:
        axes, _, result = spec.partition(",")[2].partition("->")
        inputs = sum(axis not in result for axis in axes)
        if math.prod(self.scale.shape[:inputs]) > 1 or not result.endswith(axes[inputs:]):
            return super().linear(spec, x)
        # The scale of an output can wait for the sum. Codes / 128, which is exact, are as small as weights: the sum fits into float16.
        y = product(spec, x, self.codes.astype(x.dtype) / 128)
        return (y * (self.scale * 128).reshape(self.scale.shape[inputs:])).astype(x.dtype)


def quantize(kernel: Any, inputs: int) -> Int8:
    """The kernel of one layer, whose first `inputs` axes are summed over. An output without weights has the scale 0."""
    kernel = quantized.array(kernel)
    scale = quantized.largest(kernel, (1,) * inputs + kernel.shape[inputs:]) / 127
    return Int8(jnp.round(kernel / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def axes(axes: Axes, inputs: int) -> Int8:
    """Logical axes of each array."""
    return Int8(axes, quantized.scale_axes(axes, inputs))


def make(config: ConfigDict) -> Transform:
    """As config.quant says; in groups, or not symmetric, it is an affine grid."""
    grid = affine.grid_of(config, 8)
    if grid.group or grid.ordered or not grid.symmetric:
        return affine.transform(config, grid)
    return Transform(config.quant.targets, lambda kernel, inputs, rng: quantize(kernel, inputs), axes)
