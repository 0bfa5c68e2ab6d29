"""Unrolled and scanned layers are one model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import models
from jaxllm.config import base
from jaxllm.models import stack
from jaxllm.models.remat import Remat
from jaxllm.transforms import tree
from jaxllm.types import Model

TOKENS = np.random.default_rng(0).integers(0, 19, (2, 8)).astype(np.int32)


def build(**switches: Any) -> Model:
    config = base()
    config.model.update(
        {"vocab_size": 19, "layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "context_tokens": 8, "init_std": 0.3, **switches}
    )
    return models.build(config)


def loss(model: Model, params: Any, rng: jax.Array | None = None) -> jax.Array:
    return jnp.mean(jax.nn.logsumexp(model.apply(params, TOKENS, rng=rng), axis=-1) ** 2)


def draw(model: Model) -> Any:
    """Large normal parameters by NumPy, because compiling `init` costs seconds."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), jax.eval_shape(model.init, jax.random.key(0))
    )


def test_initial_weights_are_equal_in_both_forms() -> None:
    params, stacked = (build(name="llama", layers_as=form).init(jax.random.key(3)) for form in ("unrolled", "scan"))
    jax.tree.map(np.testing.assert_array_equal, tree.stack_layers(params), stacked)
    first, second = params["layers"][0]["mlp"], params["layers"][1]["mlp"]
    assert not jnp.allclose(first["up"]["kernel"], second["up"]["kernel"])
    assert not jnp.allclose(first["up"]["kernel"], first["gate"]["kernel"])


@pytest.mark.parametrize(("name", "dropout_frac"), [("gpt", 0.0), ("llama", 0.3)])
def test_scan_is_unrolled(name: str, dropout_frac: float) -> None:
    """Loss, dropout masks and gradients, up to rounding."""
    unrolled, scan = (build(name=name, layers_as=form, dropout_frac=dropout_frac) for form in ("unrolled", "scan"))
    params, rng = draw(unrolled), jax.random.key(7)
    one, grad_one = jax.jit(jax.value_and_grad(lambda p: loss(unrolled, p, rng)))(params)
    two, grad_two = jax.jit(jax.value_and_grad(lambda p: loss(scan, p, rng)))(tree.stack_layers(params))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), tree.stack_layers(grad_one), grad_two)


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_the_runner_hands_each_layer_its_own(layers_as: str) -> None:
    """x -> (x + w_i) * (i + 1), whose result depends on the order and on which index meets which parameter."""
    run = stack.make(layers_as, 3, Remat())
    weights = np.array([3.0, 5.0, 7.0], np.float32)
    layers = {"w": weights} if layers_as == "scan" else [{"w": w} for w in weights]
    x, cache = run(lambda layer, index, x, slot: ((x + layer["w"]) * (index + 1), slot), layers, jnp.float32(1))
    assert float(x) == ((1 + 3) * 1 + 5) * 2 * 3 + 7 * 3
    assert cache is None


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_layers_in_the_wrong_form_or_number(layers_as: str) -> None:
    other = {"unrolled": "scan", "scan": "unrolled"}[layers_as]
    params = jax.eval_shape(build(layers_as=layers_as).init, jax.random.key(0))
    with pytest.raises(ValueError, match=f"model.layers_as = '{other}'.\n  Accepted: the other form"):
        jax.eval_shape(build(layers_as=other).apply, params, TOKENS)
    with pytest.raises(ValueError, match="has 3 layers.\n  Accepted: model.layers = 4"):
        jax.eval_shape(build(layers_as=layers_as, layers=4).apply, params, TOKENS)
