"""Kernels in the 4-bit NormalFloat of QLoRA with double quantization (Dettmers et al. 2023, arXiv:2305.14314, section 3).

The bytes are those that bitsandbytes 0.50 makes on a CPU, in another order: it flattens its weight [out, in], and here each array has the
axes of the kernel [in, out]. Deviations:

- Inputs that 64 does not divide are refused. There, bitsandbytes lets a block run from the end of one output into the next.
- The mean of the scales is a sum of floats in another order. In every second kernel it differs by an ulp or two, and with it the nested
  scales in their last bits, and one scale's code in 25,000. Where it is equal, so is every byte.

4.127 bits a weight: 4 for its code, 8 / 64 for its block's scale, 32 / (64 x 256) for that scale's scale. Without double quantization 4.5.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxllm.transforms import quantized
from jaxllm.types import Axes, Transform

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale

# Appendix E: quantiles of N(0, 1) that are equally far apart in probability on either side of 0, divided by the largest one.
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _middles(table: np.ndarray) -> np.ndarray:
    return (table[:-1] + table[1:]) / np.float32(2)


def _dynamic() -> np.ndarray:
    """The 256 numbers of dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861, section 2.2), ascending.

    In each of seven decades the middles of 1, 2, 4, ... 64 parts of [0.1, 1] times its power of ten, with both signs; and 0 and 1.
    """
    positive = np.concatenate([np.float32(10.0 ** (decade - 6)) * _middles(_cut(2**decade)) for decade in range(7)])
    return np.sort(np.concatenate([-positive, positive, np.array([0, 1], np.float32)]))


def _cut(parts: int) -> np.ndarray:
    """The ends of equal parts of [0.1, 1], counted from its nearer end in steps of float32: the bits of torch.linspace."""
    low, index = np.float32(0.1), np.arange(parts + 1)
    step = float((1 - low) / np.float32(parts))
    return np.where(index < (parts + 1) // 2, float(low) + index * step, 1 - (parts - index) * step).astype(np.float32)


DYNAMIC = _dynamic()
# bitsandbytes does not compare a share in [-1, 1] with the middles between these numbers on a CPU: it looks its code up in a table of so
# many steps. One code in 700 is therefore a neighbour of the nearest, about 2^-16 of the largest scale away from the middle.
STEPS = 2**16 - 1
LOOK_UP = np.searchsorted(
    _middles(DYNAMIC), np.float32(-1) + np.arange(0, 2 * STEPS + 1, 2, dtype=np.float32) / np.float32(STEPS)
).astype(np.uint8)


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "absmax", "nested", "offset"), meta_fields=("axis", "kind"))
@dataclasses.dataclass(frozen=True)
class Nf4(quantized.Quantized):
    """TABLE[code] x absmax of its block.

    codes: uint8, two a byte along `axis`, the last input axis, the first in the high half.
    absmax: of the dense kernel's rank; its input axes count the blocks. float32, or with double quantization uint8 codes of
        DYNAMIC[code] x nested + offset.
    nested: float32 [layers?, scales / 256 rounded up], over the scales of the first output, then of the second, ...; or None.
    offset: float32 [layers?], the mean of the scales; or None.
    """

    codes: Any
    absmax: Any
    nested: Any
    offset: Any
    axis: int
    kind: str = "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        return quantized.unpacked_shape(self.codes, self.axis, 4)

    def dense(self) -> jax.Array:
        codes = quantized.unpack(self.codes, self.axis, 4, high_first=True)
        return jnp.asarray(TABLE)[codes] * quantized.spread(self.scale(), self.shape)

    def scale(self) -> jax.Array:
        """absmax in float32."""
        if self.nested is None:
            return self.absmax
        shares = jnp.take(self.nested, _block(self.absmax.shape[self.nested.ndim - 1 :], self.axis), axis=-1)
        offset = self.offset.reshape(self.offset.shape + (1,) * (self.absmax.ndim - self.offset.ndim))
        return jnp.asarray(DYNAMIC)[self.absmax] * shares + offset


def _block(shape: tuple[int, ...], axis: int) -> jax.Array:
    """int32 of this shape: of each scale of a kernel (of one layer), which of the nested scales is its own.

    Counted out rather than laid out: where devices share the scales, each knows that of its own, and nothing travels.
    """
    inputs = len(shape) + axis + 1
    place = jnp.zeros(shape, jnp.int32)
    for dimension in (*range(inputs, len(shape)), *range(inputs)):  # in the order of bitsandbytes
        place = place * shape[dimension] + jax.lax.broadcasted_iota(jnp.int32, shape, dimension)
    return place // SCALES


def _by_outputs(x: jax.Array, axis: int, layers: int) -> tuple[jax.Array, tuple[int, ...]]:
    """[layers?, inputs..., outputs...] as [layers?, n], the inputs of the first output first; and its shape before it was flat."""
    turned = jnp.moveaxis(x, range(axis + 1, 0), range(layers, layers - axis - 1))
    return turned.reshape(*x.shape[:layers], -1), turned.shape


def _by_inputs(flat: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The inverse of `_by_outputs`."""
    layers = flat.ndim - 1
    return jnp.moveaxis(flat.reshape(shape), range(layers, layers - axis - 1), range(axis + 1, 0))


def quantize(kernel: Any, inputs: int, double: bool) -> Nf4:
    """The kernel of one layer, whose first `inputs` axes are summed over. ValueError if blocks of 64 inputs do not make it up."""
    kernel = quantized.array(kernel)
    scales = quantized.scale_shape(kernel.shape, inputs, BLOCK)
    if scales is None:
        raise ValueError(
            f"nf4 cannot cut the inputs {kernel.shape[:inputs]} of a kernel of shape {kernel.shape} into blocks of {BLOCK}.\n"
            f"  Accepted: a multiple of {BLOCK}; of two axes (heads, head_dim) head_dim a multiple of {BLOCK}, or an even divisor of it"
            f" and heads x head_dim a multiple.\n  Change the sizes of the model, use int4, or change quant.targets."
        )
    axis = quantized.packed_axis(kernel, inputs)
    absmax = quantized.largest(kernel, scales)
    # In the order of bitsandbytes, since x / absmax may be rounded to the other side of a middle. A block of zeros stays one.
    shares = kernel * quantized.spread(1 / jnp.where(absmax > 0, absmax, 1), kernel.shape)
    # The number of middles that lie below. 15 comparisons, which are fused, are faster than a search and need no memory.
    codes = sum((shares > middle).astype(jnp.uint8) for middle in _middles(TABLE))
    packed = quantized.pack(codes, axis, 4, high_first=True)
    if not double:
        return Nf4(packed, absmax, None, None, axis)
    return Nf4(packed, *_compress(absmax, axis), axis=axis)


def _compress(absmax: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes, nested, offset) of the scales of one layer."""
    flat, shape = _by_outputs(absmax, axis, 0)
    # What the first mean lost in adding thousands of numbers one by one is found by the mean of what is left.
    crude = flat.mean()
    offset = crude + (flat - crude).mean()
    blocks = jnp.pad(flat - offset, (0, -flat.size % SCALES)).reshape(-1, SCALES)
    nested = jnp.abs(blocks).max(1)
    # Where all are 0, bitsandbytes has the code 0.
    shares = jnp.where(nested[:, None] > 0, blocks * (1 / nested[:, None]), -1)
    steps = ((shares + 1) * 0.5 * STEPS + 0.5).astype(jnp.int32)
    codes = jnp.asarray(LOOK_UP)[steps].reshape(-1)[: flat.size]
    return _by_inputs(codes, shape, axis), nested, offset


def make(config: ConfigDict) -> Transform:
    double = config.quant.double

    def axes(axes: Axes, inputs: int) -> Nf4:
        nested, offset = (("groups",), ()) if double else (None, None)
        return Nf4(axes, quantized.scale_axes(axes, inputs), nested, offset, inputs - 1 - len(axes))

    return Transform(config.quant.targets, lambda kernel, inputs, rng: quantize(kernel, inputs, double), axes)
