"""Unrolled and scanned layers are one model; recomputation changes memory, not numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import models
from jaxllm.config import base
from jaxllm.models import stack
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


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_scan_is_unrolled(name: str) -> None:
    """Same initial weights to the bit; logits, dropout and gradients equal to rounding."""
    unrolled, scan = (build(name=name, layers_as=form, dropout_frac=0.3) for form in ("unrolled", "scan"))
    params = unrolled.init(jax.random.key(3))
    stacked = scan.init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, tree.stack_layers(params), stacked)
    first, second = params["layers"][0]["mlp"]["up"]["kernel"], params["layers"][1]["mlp"]["up"]["kernel"]
    assert not jnp.allclose(first, second)
    for rng in (None, jax.random.key(7)):
        one, grad_one = jax.jit(jax.value_and_grad(lambda p: loss(unrolled, p, rng)))(params)  # noqa: B023
        two, grad_two = jax.jit(jax.value_and_grad(lambda p: loss(scan, p, rng)))(stacked)  # noqa: B023
        np.testing.assert_allclose(one, two, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), tree.stack_layers(grad_one), grad_two)


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_remat_changes_no_gradient(layers_as: str) -> None:
    """Dropout on: the backward pass must draw the very masks of the forward pass."""
    rng, gradients, products = jax.random.key(7), {}, {}
    for remat in ("none", "dots", "full"):
        model = build(name="llama", layers_as=layers_as, dropout_frac=0.3, remat=remat)
        params = model.init(jax.random.key(3))
        gradient = jax.grad(lambda p, model=model: loss(model, p, rng))
        gradients[remat] = jax.jit(gradient)(params)
        products[remat] = str(jax.make_jaxpr(gradient)(params)).count("dot_general[")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradients["none"], gradients[remat])
    # "dots" recomputes only the two products of attention; "full" also those with parameters.
    layers = 3 if layers_as == "unrolled" else 1
    assert products["none"] < products["dots"] <= products["none"] + 2 * layers < products["full"]


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_the_runner_hands_each_layer_its_own(layers_as: str) -> None:
    """x -> (x + w_i) * (i + 1), whose result depends on the order and on which index meets which parameter."""
    run = stack.make(layers_as, 3, "none")
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
