"""Activations against their formulas in float64."""

import math

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


@pytest.mark.parametrize("name", activations.FUNCTIONS)
def test_function_equals_its_formula(name):
    # The two forms of gelu differ by up to 5e-4: the tolerance tells them apart.
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = [FORMULAS[name](float(value)) for value in x]
    np.testing.assert_allclose(activations.FUNCTIONS[name](jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
