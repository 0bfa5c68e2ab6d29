"""Meshes, placements and their bytes; a sharded model has the logits and gradients of an unsharded one."""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.config import base
from jaxllm.parallel import plan
from jaxllm.transforms import tree


def tiny(data: int = 1, fsdp: int = 1, tensor: int = 1, **model: Any) -> ConfigDict:
    config = base()
    config.model.update({"vocab_size": 32, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "context_tokens": 16, **model})
    config.parallel.update({"data": data, "fsdp": fsdp, "tensor": tensor})
    return config


def abstract(model: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((2, 2, 2), (1, 2, 2, 1, 2)), ((-1, 2, 2), (1, 2, 2, 1, 2)), ((1, -1, 1), (1, 1, 8, 1, 1)), ((2, 2, -1), (1, 2, 2, 1, 2))],
)
def test_mesh_has_five_axes_outermost_first(sizes: tuple, expected: tuple) -> None:
    mesh = plan.make(tiny(*sizes)).mesh
    assert mesh.axis_names == ("pipe", "data", "fsdp", "seq", "tensor") and mesh.devices.shape == expected
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_idle_devices_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert plan.make(tiny(2, 1, 3)).mesh.size == 6
    assert "= 6 of 8 devices are used" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert plan.make(tiny(), jax.devices()[:1]).mesh.size == 1
    assert not caplog.text


@pytest.mark.parametrize(
    ("sizes", "batch", "words"),
    [
        (
            (2, 4, 2),
            (16, 1),
            r"= 2 x 4 x 2 = 16, but there are 8 devices.\n  Accepted: a product of up to 8.*\n.*JAX_NUM_CPU_DEVICES=16",
        ),
        ((-1, 3, 1), (16, 1), r"parallel.fsdp = 3 does not divide the 8 devices.*\n  Accepted: 1, 2, 4, 8"),
        ((2, 2, 2), (6, 1), r"6 / 1 = 6 rows .*= 4.\n  Accepted: multiples of 4 rows.\n.*multiple of 4, such as 8"),
        ((2, 2, 2), (12, 6), r"12 / 6 = 2 rows .*= 4.\n  Accepted: multiples of 4 rows.\n.*multiple of 24, such as 24"),
    ],
)
def test_impossible_meshes(sizes: tuple, batch: tuple, words: str) -> None:
    config = tiny(*sizes)
    config.train.batch_seqs, config.train.microbatches = batch
    with pytest.raises(ValueError, match=words):
        plan.make(config)


def test_a_dimension_that_does_not_divide_names_the_parameter() -> None:
    config = tiny(1, 1, 4, heads=2)
    words = r"parallel.tensor = 4 does not divide dimension 0 \('heads'\) of 'layers/attention/o/kernel', which is 2.\n  Accepted: 1, 2."
    model = models.build(config)
    with pytest.raises(ValueError, match=words):
        plan.make_abstract(config).shardings(model.axes, abstract(model))


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_state_lies_where_its_parameters_lie(layers_as: str) -> None:
    """Moments under chained, masked and factored optimizers; holes, counts and keys; a norm inside the layers and the last one."""
    config = tiny(2, 2, 2, layers_as=layers_as)
    made, model = plan.make(config), models.build(config)
    params = abstract(model)
    expected = made.shardings(model.axes, params)
    trained, frozen = tree.split(params, tree.matches("layers/.*|norm/scale", params))
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, trained)
    tx = optax.chain(optax.masked(optax.trace(0.9), decayed), optax.scale_by_adam())
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.eval_shape(jax.random.key, 0),
        "params": params,
        "frozen": frozen,
        "optimizer": jax.eval_shape(tx.init, trained),
        "factored": jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=2).init, params),
    }
    got = made.state_shardings(state, model.axes, params)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert got["params"] == expected
    assert got["frozen"] == tree.split(expected, tree.matches("layers/.*|norm/scale", params))[1]
    assert got["optimizer"][1].mu == got["optimizer"][1].nu == tree.split(expected, tree.matches("layers/.*|norm/scale", params))[0]
    moments = got["optimizer"][0].inner_state.trace
    layer = (lambda t: t["layers"][0]) if layers_as == "unrolled" else (lambda t: t["layers"])
    assert layer(moments)["mlp"]["up"] == layer(expected)["mlp"]["up"]
    assert got["step"] == got["key"] == got["optimizer"][1].count == made.replicated
    assert set(jax.tree.leaves(got["factored"].v_row)) == {made.replicated}


@pytest.mark.parametrize(("name", "layers_as"), [("gpt", "unrolled"), ("llama", "scan")])
def test_eight_devices_compute_what_one_does(name: str, layers_as: str) -> None:
    """data 2 x fsdp 2 x tensor 2: loss, logits and gradients; and the logits lie where their axes say."""
    config = tiny(2, 2, 2, name=name, layers_as=layers_as)
    made = plan.make(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (4, 16)).astype(np.int32)
    results = []
    for used in (made, plan.make(tiny(), jax.devices()[:1])):
        model = models.build(config, used.constrain)
        params = abstract(model)
        shardings = used.shardings(model.axes, params)
        rng = np.random.default_rng(0)
        values = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), params)  # noqa: B023

        def loss(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(params, tokens)  # noqa: B023
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2), logits

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=(shardings, used.batch_sharding()))
        (value, logits), gradients = gradient(values, tokens)
        results.append(jax.tree.map(np.asarray, (value, logits, gradients)))
        if used is made:
            assert logits.sharding.is_equivalent_to(made.sharding(("batch", "length", "vocab"), logits.shape, ""), 3)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_collectives_of_a_forward_pass() -> None:
    """ZeRO-3 gathers each parameter once; tensor parallelism sums once a sub-block (Shoeybi et al. 2019, fig. 4) and once for
    the embedding, whose rows are spread; decoding moves no cache."""
    config = tiny(2, 2, 2)
    made = plan.make(config)
    model = models.build(config, made.constrain)
    params = abstract(model)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        made.shardings(model.axes, params),
    )
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=made.batch_sharding())

    def count(compiled: str) -> dict[str, int]:
        kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
        return {kind: found for kind in kinds if (found := len(re.findall(rf" {kind}(-start)?\(", compiled)))}

    expected = {"all-gather": len(jax.tree.leaves(params)), "all-reduce": 1 + 2 * 2}
    assert count(jax.jit(model.apply).lower(placed, tokens).compile().as_text()) == expected
    cache = model.init_cache(4, 16)
    assert cache["layers"][0]["k"].sharding.spec == P(("data", "fsdp"), "tensor", None, None)
    step = jax.jit(model.decode).lower(placed, jnp.ones((4, 1), jnp.int32), jnp.ones(4, jnp.int32), cache).compile()
    assert count(step.as_text()) == expected


def test_activation_constraints_speak_of_activations() -> None:
    made = plan.make(tiny(2, 2, 2))
    axes = ("batch", "length")
    words = r"parallel.data x parallel.fsdp = 4 does not divide dimension 0 \('batch'\) of 'an activation"
    for use in (
        lambda x: made.constrain(x, axes),
        lambda x: made.constrain.share(lambda x: (jnp.sin(x),), ((x, axes),), (axes,))[0],
    ):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(use, jnp.zeros((3, 8)))


def test_llama_70b_on_256_devices() -> None:
    """fsdp 32 x tensor 8 without devices: each of 256 holds its share of all but the norms' scales, which only fsdp shares."""
    config = tiny(1, 32, 8, layers=80, width=8192, heads=64, kv_heads=8, mlp_width=28672, vocab_size=128_256, layers_as="scan")
    config.train.batch_seqs = 32
    made, model = plan.make_abstract(config), models.build(config)
    params = abstract(model)
    shardings = made.shardings(model.axes, params)
    scales = (2 * 80 + 1) * 8192
    assert plan.shard_bytes(shardings, params) == 4 * ((70_553_706_496 - scales) // 256 + scales // 32)
    specs = dict(zip(tree.names(params), (s.spec for s in jax.tree.leaves(shardings)), strict=True))
    assert specs["layers/attention/q/kernel"] == P("pipe", "fsdp", "tensor", None)
    assert specs["layers/mlp/down/kernel"] == P("pipe", "tensor", "fsdp")
    assert specs["embed/tokens"] == specs["head/kernel"] == P("tensor", ("fsdp", "pipe"))
    adam = jax.eval_shape(optax.adam(1e-3).init, params)
    state = made.state_shardings(adam, model.axes, params)
    assert plan.shard_bytes(state, adam) == 2 * plan.shard_bytes(shardings, params) + 4
