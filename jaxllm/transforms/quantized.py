"""Kernels in a few bits: leaf types that take the place of a dense kernel and are not trained.

Each array inside keeps the rank and the axis order of the dense kernel [layers?, inputs..., outputs...]; only lengths shrink. So one layer
of a stack, or the part that a device holds, is again such a leaf, and no size is written down anywhere but in the arrays.
"""

import abc
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.transforms.product import product
from jaxllm.types import Axes


class Quantized(abc.ABC):
    """A frozen kernel as codes and scales. `codes` has the axes of the kernel."""

    codes: Any

    @property
    def form(self) -> str:
        """What it is called."""
        return type(self).__name__.lower()

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The dense kernel that this one stands for, in float32."""

    def linear(self, spec: str, x: jax.Array) -> jax.Array:
        """`jnp.einsum(spec, x, dense kernel)` in x.dtype."""
        return product(spec, x, self.dense())

    def forward(self, spec: str, x: jax.Array) -> jax.Array:
        """What a forward pass computes: `linear`, or what is close to it."""
        return self.linear(spec, x)

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        """The same; the dense kernel is made when x is there, and again by a backward pass, where autodiff would keep that of every
        layer."""
        return _multiply(x, self, spec)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: Quantized, spec: str) -> jax.Array:
    return _in_turn(kernel, x).forward(spec, x)


def _in_turn(kernel: Quantized, x: jax.Array) -> Quantized:
    """The kernel, whose dense form cannot be made before x is there.

    Compilers make what depends on parameters alone as early as they like, outside of the loop over new tokens, and then every dense
    kernel is in memory at once. XLA's CPU backend drops the barrier that would tie both together: there the arrays depend on a number of x.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((kernel, x))[0]
    first = x.reshape(-1)[0]
    never = jnp.isnan(first) & jnp.isinf(first)  # which no compiler finds out
    return jax.tree.map(lambda array: jnp.where(never, 0, array), kernel)


def _forward(x: jax.Array, kernel: Quantized, spec: str) -> tuple[jax.Array, Quantized]:
    return _multiply(x, kernel, spec), kernel


def _backward(spec: str, kernel: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    # Nor is the dense kernel of the forward pass kept for it.
    kernel = _in_turn(kernel, dy)
    inputs, _, result = spec.partition("->")
    x_axes, kernel_axes = inputs.split(",")
    lengths = dict(zip(kernel_axes, kernel.shape, strict=True)) | dict(zip(result, dy.shape, strict=True))
    x = jax.ShapeDtypeStruct(tuple(lengths[axis] for axis in x_axes), dy.dtype)
    (dx,) = jax.linear_transpose(partial(kernel.linear, spec), x)(dy)
    return dx, None


_multiply.defvjp(_forward, _backward)


def array(kernel: object) -> jax.Array:
    """The kernel in float32; ValueError if an earlier transform has made something else of it."""
    if not isinstance(kernel, jax.Array | np.ndarray):
        raise ValueError(
            f"a kernel of type {type(kernel).__name__} is to be quantized.\n  Accepted: a dense kernel.\n"
            "  Quantize each kernel once, and before anything is added to it: change the order of the transforms, or quant.targets."
        )
    return jnp.asarray(kernel, jnp.float32)


def scale_axes(axes: Axes, inputs: int) -> Axes:
    """Logical axes of scales, of which several inputs share one."""
    return ("groups",) * inputs + axes[inputs:]


def packed_axis(kernel: jax.Array, inputs: int) -> int:
    """The last input axis, along which codes are packed, counted from the end: there it stays when layers are stacked."""
    return inputs - 1 - kernel.ndim


def scale_shape(shape: tuple[int, ...], inputs: int, group: int, unit: int = 2) -> tuple[int, ...] | None:
    """Shape of the scales where runs of `group` inputs, in row-major order, share one; None where such runs are not boxes.

    Of two input axes [H, K] a run is a part of a K, or several whole ones. K must be a multiple of `unit`, too, since codes are packed
    along it.
    """
    *outer, last = shape[:inputs]
    if last % unit:
        return None
    if group == math.prod(shape[:inputs]):
        return (1,) * inputs + shape[inputs:]
    if last % group == 0:
        return (*outer, last // group, *shape[inputs:])
    if outer and group % last == 0 and outer[-1] % (group // last) == 0:
        return (*outer[:-1], outer[-1] // (group // last), 1, *shape[inputs:])
    return None


def over_groups(function: Callable[..., jax.Array], x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """function(x, axes), such as jnp.max, over each group; `shape` has as many axes as x, and lengths that divide those of x."""
    parts = [part for whole, groups in zip(x.shape, shape, strict=True) for part in (groups, whole // groups)]
    return function(x.reshape(parts), tuple(range(1, len(parts), 2)))


def largest(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Largest |x| of each group, as `over_groups`."""
    return over_groups(jnp.max, jnp.abs(x), shape)


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x with each number repeated along each axis, as often as it takes to have this shape."""
    parts = [part for whole, groups in zip(shape, x.shape, strict=True) for part in (groups, whole // groups)]
    return jnp.broadcast_to(jnp.expand_dims(x, tuple(range(1, len(parts), 2))), parts).reshape(shape)


def unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that fills whole bytes."""
    codes = 8 // math.gcd(8, bits)
    return codes, codes * bits // 8


def pack(codes: jax.Array, axis: int, bits: int, *, high_first: bool = False) -> jax.Array:
    """Codes below 2^bits packed along `axis` (negative): uint8, bits / 8 times as long there.

    They follow each other in a stream of bits whose bytes begin with their lowest bit, so that four bytes are a little-endian word.
    high_first: the first code of a byte is in its highest bits.
    """
    number, size = unit(bits)
    parts = _cut(codes.astype(jnp.uint32 if size > 1 else jnp.uint8), axis, number)
    shifts = _shifts(bits, high_first)
    word = functools.reduce(
        jnp.bitwise_or, (jax.lax.index_in_dim(parts, index, axis, keepdims=False) << shift for index, shift in enumerate(shifts))
    )
    if size == 1:
        return word
    return _joined(jnp.stack([(word >> 8 * index & 255).astype(jnp.uint8) for index in range(size)], word.ndim + axis + 1), axis)


def unpack(packed: jax.Array, axis: int, bits: int, *, high_first: bool = False) -> jax.Array:
    """The inverse of `pack`."""
    size = unit(bits)[1]
    word = packed
    if size > 1:
        parts = _cut(packed.astype(jnp.uint32), axis, size)
        word = functools.reduce(
            jnp.bitwise_or, (jax.lax.index_in_dim(parts, index, axis, keepdims=False) << 8 * index for index in range(size))
        )
    codes = [(word >> shift & (1 << bits) - 1).astype(jnp.uint8) for shift in _shifts(bits, high_first)]
    return _joined(jnp.stack(codes, word.ndim + axis + 1), axis)


def unpacked_shape(packed: jax.Array, axis: int, bits: int) -> tuple[int, ...]:
    """Shape of the codes that were packed along `axis`."""
    shape = list(packed.shape)
    shape[axis] = shape[axis] * 8 // bits
    return tuple(shape)


def _shifts(bits: int, high_first: bool) -> list[int]:
    shifts = [index * bits for index in range(unit(bits)[0])]
    return shifts[::-1] if high_first else shifts


def _cut(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Runs of this length along `axis`; they lie along it, and the axis before it counts them."""
    shape = list(x.shape)
    shape[axis:] = [shape[axis] // length, length, *shape[x.ndim + axis + 1 :]]
    return x.reshape(shape)


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`."""
    shape = list(x.shape)
    shape[axis - 1 :] = [shape[axis - 1] * shape[axis], *shape[x.ndim + axis + 1 :]]
    return x.reshape(shape)
