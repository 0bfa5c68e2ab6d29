"""Kernels in 8 bits: a symmetric scale an output, its largest weight / 127 (Dettmers et al. 2022, arXiv:2208.07339, eq. 2, by outputs).

With quant.activations = "int8" what they multiply is rounded, too, with a scale of each token's own (W8A8), and the product is one of whole
numbers: exact, and on many chips twice as fast.
"""

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


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("rounds", "kind"))
@dataclasses.dataclass(frozen=True)
class Int8(quantized.Quantized):
    """codes x scale. codes: int8, of the dense kernel's shape; scale: float32, its input axes have length 1.

    rounds: what it multiplies is rounded to 8 bits; a backward pass goes by the product without that (Bengio et al. 2013,
    arXiv:1308.3432: straight through).
    """

    codes: Any
    scale: Any
    rounds: bool = False
    kind: str = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dense(self) -> jax.Array:
        return self.codes * self.scale

    def forward(self, spec: str, x: jax.Array) -> jax.Array:
        return self._whole(spec, x) if self.rounds else self.linear(spec, x)

    def _whole(self, spec: str, x: jax.Array) -> jax.Array:
        """The product of codes with codes, in int32, times both scales."""
        inputs, _, result = spec.partition("->")
        x_axes, kernel_axes = inputs.split(",")
        summed = tuple(index for index, axis in enumerate(x_axes) if axis in kernel_axes and axis not in result)
        codes, scale = round_tokens(x, summed)
        y = jnp.einsum(spec, codes, self.codes, preferred_element_type=jnp.int32).astype(jnp.float32)
        kept = "".join(axis for axis in x_axes if axis in result)
        new = "".join(axis for axis in kernel_axes if axis in result)
        of_outputs = self.scale.max(tuple(index for index, axis in enumerate(kernel_axes) if axis not in result))
        return jnp.einsum(f"{result},{kept},{new}->{result}", y, scale.squeeze(summed), of_outputs).astype(x.dtype)

    def linear(self, spec: str, x: jax.Array) -> jax.Array:
        axes, _, result = spec.partition(",")[2].partition("->")
        inputs = sum(axis not in result for axis in axes)
        if math.prod(self.scale.shape[:inputs]) > 1 or not result.endswith(axes[inputs:]):
            return super().linear(spec, x)
        # The scale of an output can wait for the sum. Codes / 128, which is exact, are as small as weights: the sum fits into float16.
        y = product(spec, x, self.codes.astype(x.dtype) / 128)
        return (y * (self.scale * 128).reshape(self.scale.shape[inputs:])).astype(x.dtype)


def round_tokens(x: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(int8 codes, float32 scale) of activations: a scale for each token, its largest number / 127, with the axes `summed` of length 1."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(summed, keepdims=True) / 127
    return jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def quantize(kernel: Any, inputs: int, rounds: bool = False) -> Int8:
    """The kernel of one layer, whose first `inputs` axes are summed over. An output without weights has the scale 0."""
    kernel = quantized.array(kernel)
    scale = quantized.largest(kernel, (1,) * inputs + kernel.shape[inputs:]) / 127
    return Int8(jnp.round(kernel / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale, rounds)


def make(config: ConfigDict) -> Transform:
    """As config.quant says; in groups, or not symmetric, it is an affine grid."""
    grid, rounds = affine.grid_of(config, 8), config.quant.activations == "int8"
    if grid.group or grid.ordered or not grid.symmetric:
        return affine.transform(config, grid)

    def axes(names: Axes, inputs: int) -> Int8:
        return Int8(names, quantized.scale_axes(names, inputs), rounds)

    return Transform(config.quant.targets, lambda kernel, inputs, rng: quantize(kernel, inputs, rounds), axes)
