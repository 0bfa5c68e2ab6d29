"""The gradient of a kernel, made later of what a backward pass left, is the one that is made at once."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import layers
from jaxllm.transforms import leaf
from jaxllm.transforms.deferred import Deferred, Factors, Notes, Probe, gradient
from jaxllm.transforms.product import product

# Every product of a layer: (spec, shape of x, shape of the kernel, dtype of x).
USES = (
    ("BTD,DHK->BTHK", (2, 3, 8), (8, 2, 4), jnp.float32),
    ("BTHK,HKD->BTD", (2, 3, 2, 4), (2, 4, 8), jnp.float32),
    ("BTD,DF->BTF", (2, 3, 8), (8, 16), jnp.float32),
    ("BTF,FD->BTD", (2, 3, 16), (16, 8), jnp.float32),
    ("BTF,FD->BTD", (2, 3, 16), (16, 8), jnp.bfloat16),
)


def test_these_are_the_products_of_layers() -> None:
    written = set(re.findall(r'"(\w+,\w+->\w+)"', Path(layers.__file__).read_text(encoding="utf-8")))
    assert written == {spec for spec, *_ in USES}


@pytest.mark.parametrize(("spec", "x_shape", "kernel_shape", "dtype"), USES)
def test_put_off_is_not_changed(spec: str, x_shape: tuple, kernel_shape: tuple, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=x_shape), dtype), jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)
    notes = Notes()
    y = leaf.einsum(spec, x, Probe(kernel, "a", notes))
    dy = jnp.asarray(rng.normal(size=y.shape), dtype)
    expected_y, backward = jax.vjp(lambda x, kernel: product(spec, x, kernel), x, kernel)
    np.testing.assert_array_equal(y, expected_y)

    use = notes.uses["a"]
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), use.factors)
    found_y, back = jax.vjp(lambda x, factors: leaf.einsum(spec, x, Deferred(kernel, factors)), x, zeros)
    np.testing.assert_array_equal(found_y, expected_y)
    dx, factors = back(dy)
    expected_dx, expected_dw = backward(dy)
    np.testing.assert_array_equal(dx, expected_dx)
    # Nothing but the two factors was kept, each to the bit.
    np.testing.assert_array_equal(factors.x, x)
    np.testing.assert_array_equal(factors.dy, dy)
    dw = gradient(use, factors)
    assert dw.dtype == jnp.float32 and dw.shape == kernel_shape
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-6)
    letters, _, result = spec.partition("->")
    x_letters, kernel_letters = letters.split(",")
    by_hand = np.einsum(f"{x_letters},{result}->{kernel_letters}", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    np.testing.assert_allclose(
        np.asarray(dw, np.float64), by_hand, rtol=0, atol=np.abs(by_hand).max() * (1e-6 if dtype == jnp.float32 else 1e-2)
    )


def test_a_step_that_puts_a_gradient_off_multiplies_once_less() -> None:
    """The backward pass of a deferred kernel has the product for dx, and none for dW."""
    x, kernel = jnp.ones((2, 3, 8)), jnp.ones((8, 16))
    factors = Factors(jnp.zeros((2, 3, 8)), jnp.zeros((2, 3, 16)))

    def products(function: Callable, *arguments: object) -> int:
        return str(jax.make_jaxpr(jax.grad(function, argnums=tuple(range(len(arguments)))))(*arguments)).count("dot_general")

    def deferred(x: jax.Array, factors: Factors) -> jax.Array:
        return jnp.sum(leaf.einsum("BTD,DF->BTF", x, Deferred(kernel, factors)) ** 2)

    def at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(leaf.einsum("BTD,DF->BTF", x, kernel) ** 2)

    assert (products(deferred, x, factors), products(at_once, x, kernel)) == (2, 3)
