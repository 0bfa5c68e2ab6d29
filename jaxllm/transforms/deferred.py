"""A kernel whose gradient is made later: what a pipeline puts off to fill its bubbles (Qi et al. 2023, arXiv:2401.10241, section 2).

The gradient of a kernel is a product of what the kernel was multiplied with and of what came back: dW = x^T dy. A backward pass through
a `Deferred` kernel leaves these two as the "gradients" of two arrays of zeros that nothing reads, and makes dx alone. `gradient` makes dW
of them at any time.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.transforms.product import product


class Factors(NamedTuple):
    """x and dy of dW = x^T dy, or arrays of their shapes."""

    x: Any
    dy: Any


class Use(NamedTuple):
    """How a kernel was multiplied: the spec of its product, and the shapes of the kernel and of both factors."""

    spec: str
    kernel: jax.ShapeDtypeStruct
    factors: Factors


@partial(jax.tree_util.register_dataclass, data_fields=("kernel", "factors"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A leaf of the parameter tree. factors: zeros, whose gradients are the factors of the kernel's."""

    kernel: jax.Array
    factors: Factors
    kind: str = "deferred"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        return _multiply(x, self.kernel, self.factors, spec)


class Notes:
    """How kernels were used, by name. Hashed by identity, as a tree definition needs it."""

    def __init__(self) -> None:
        self.uses: dict[str, Use] = {}


@partial(jax.tree_util.register_dataclass, data_fields=("kernel",), meta_fields=("name", "notes"))
@dataclasses.dataclass(frozen=True)
class Probe:
    """A leaf that notes how it is used while a function of it is traced."""

    kernel: jax.Array
    name: str
    notes: Notes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def multiply(self, spec: str, x: jax.Array) -> jax.Array:
        y = product(spec, x, self.kernel)
        kernel, *factors = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (self.kernel, x, y))
        self.notes.uses[self.name] = Use(spec, kernel, Factors(*factors))
        return y


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(x: jax.Array, kernel: jax.Array, factors: Factors, spec: str) -> jax.Array:
    del factors
    return product(spec, x, kernel)


def _forward(x: jax.Array, kernel: jax.Array, factors: Factors, spec: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(x, kernel, factors, spec), (x, kernel)


def _backward(spec: str, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None, Factors]:
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: product(spec, x, kernel), x)(dy)
    return dx, None, Factors(x, dy)


_multiply.defvjp(_forward, _backward)


def gradient(use: Use, factors: Factors) -> jax.Array:
    """dW in float32, of a kernel that was used like this."""
    kernel = jax.ShapeDtypeStruct(use.kernel.shape, jnp.float32)
    (found,) = jax.linear_transpose(lambda w: product(use.spec, factors.x, w), kernel)(factors.dy)
    return found
