"""Activations against their formulas in float64, and their slopes against central differences of the formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import activations

FORMULAS = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}
# 0 is left out: relu has no slope there.
X = np.linspace(-12, 12, 200, dtype=np.float32)


@pytest.mark.parametrize("name", activations.FUNCTIONS)
def test_function_and_slope_equal_the_formula(name):
    # The two forms of gelu differ by up to 5e-4: the tolerance tells them apart.
    function, formula = activations.FUNCTIONS[name], FORMULAS[name]
    expected = [formula(float(x)) for x in X]
    np.testing.assert_allclose(function(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-6)
    slopes = [(formula(float(x) + 1e-5) - formula(float(x) - 1e-5)) / 2e-5 for x in X]
    # In float32 the slope of tanh near 1 is off by 3e-6, times x.
    np.testing.assert_allclose(jax.vmap(jax.grad(function))(jnp.asarray(X)), slopes, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("name", activations.FUNCTIONS)
def test_bfloat16_is_rounded_once(name):
    x = jnp.asarray(X, jnp.bfloat16)
    y, slope = activations.FUNCTIONS[name](x), jax.vmap(jax.grad(activations.FUNCTIONS[name]))(x)
    assert y.dtype == slope.dtype == jnp.bfloat16
    expected = [FORMULAS[name](float(value)) for value in x]
    # bfloat16 keeps 8 bits, so the nearest one is off by 2^-8 of the number at most; the rest is float32's, as above.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)
