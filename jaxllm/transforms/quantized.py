"""Kernels in a few bits: leaf types that take the place of a dense kernel and are not trained.

Each array inside keeps the rank and the axis order of the dense kernel [layers?, inputs..., outputs...]; only lengths shrink. So one layer
of a stack, or the part that a device holds, is again such a leaf, and no size is written down anywhere but in the arrays.
"""

import abc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.transforms.product import product
from jaxllm.types import Axes

# By how many bits the two codes of a byte are shifted, the first code's first.
LOW_FIRST, HIGH_FIRST = (0, 4), (4, 0)


class Quantized(abc.ABC):
    """A frozen kernel as codes and scales. `codes` has the axes of the kernel."""

    codes: Any

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

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        """The same; a backward pass makes the dense kernel again, where autodiff would keep that of every layer."""
        return _multiply(x, self, spec)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: Quantized, spec: str) -> jax.Array:
    return kernel.linear(spec, x)


def _forward(x: jax.Array, kernel: Quantized, spec: str) -> tuple[jax.Array, Quantized]:
    return _multiply(x, kernel, spec), kernel


def _backward(spec: str, kernel: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    # Tied together, so that the compiler neither keeps the dense kernel of the forward pass nor makes this one before its turn. XLA's CPU
    # backend drops the tie, as it does that of jax.checkpoint: there it takes a scan over the layers to hold one dense kernel at a time.
    kernel, dy = jax.lax.optimization_barrier((kernel, dy))
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
    """The last input axis, along which two codes share a byte, counted from the end: there it stays when layers are stacked."""
    return inputs - 1 - kernel.ndim


def scale_shape(shape: tuple[int, ...], inputs: int, group: int) -> tuple[int, ...] | None:
    """Shape of the scales where runs of `group` inputs, in row-major order, share one; None where such runs are not boxes.

    Of two input axes [H, K] a run is a part of a K, or several whole ones. K must be even, too, since codes are packed along it.
    """
    *outer, last = shape[:inputs]
    if last % 2:
        return None
    if last % group == 0:
        return (*outer, last // group, *shape[inputs:])
    if outer and group % last == 0 and outer[-1] % (group // last) == 0:
        return (*outer[:-1], outer[-1] // (group // last), 1, *shape[inputs:])
    return None


def largest(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Largest |x| of each group; `shape` has as many axes as x, and lengths that divide those of x."""
    parts = [part for whole, groups in zip(x.shape, shape, strict=True) for part in (groups, whole // groups)]
    return jnp.abs(x).reshape(parts).max(tuple(range(1, len(parts), 2)))


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x with each number repeated along each axis, as often as it takes to have this shape."""
    parts = [part for whole, groups in zip(shape, x.shape, strict=True) for part in (groups, whole // groups)]
    return jnp.broadcast_to(jnp.expand_dims(x, tuple(range(1, len(parts), 2))), parts).reshape(shape)


def pack(codes: jax.Array, axis: int, shifts: tuple[int, int]) -> jax.Array:
    """Codes below 16, two neighbours along `axis` (negative) in a byte: uint8, half as long there."""
    pairs = _pairs(codes.astype(jnp.uint8), axis)
    first, second = (jax.lax.index_in_dim(pairs, index, axis, keepdims=False) for index in (0, 1))
    return first << shifts[0] | second << shifts[1]


def _pairs(x: jax.Array, axis: int) -> jax.Array:
    shape = list(x.shape)
    shape[axis:] = [shape[axis] // 2, 2, *shape[x.ndim + axis + 1 :]]
    return x.reshape(shape)


def unpack(packed: jax.Array, axis: int, shifts: tuple[int, int]) -> jax.Array:
    """The inverse of `pack`."""
    codes = jnp.stack([packed >> shift & 15 for shift in shifts], packed.ndim + axis + 1)
    return codes.reshape(unpacked_shape(packed, axis))


def unpacked_shape(packed: jax.Array, axis: int) -> tuple[int, ...]:
    """Shape of the codes that were packed along `axis`."""
    shape = list(packed.shape)
    shape[axis] *= 2
    return tuple(shape)
