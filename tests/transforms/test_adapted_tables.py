"""Adapters of the table of tokens and of the output head: beside the formulas in NumPy float64, in models, and on meshes."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import combinations

from jaxllm import models
from jaxllm.engine import session
from jaxllm.objectives import tokens as objective
from jaxllm.parallel import plan
from jaxllm.transforms import adapt, dora, leaf, lora, tree

VOCAB, WIDTH, RANK, SCALE = 11, 6, 3, 1.75
KINDS = {"lora": lora, "dora": dora}
# Of a float32 sum of a dozen products, in parts of the largest number.
ROUNDING = 2e-6
BOTH, TOKENS = "embed/tokens|head/kernel", "embed/tokens"
# Family, tied head, what is adapted: tied and untied, one table for one, two and three readers, biases at the output, scaled outputs.
MODELS = [
    ("gpt", "on", TOKENS),
    ("gpt", "off", BOTH),
    ("llama", "off", "head/kernel|.*attention/q/kernel"),
    ("llama", "on", TOKENS),
    ("bert", "auto", TOKENS),
    ("t5", "on", TOKENS),
    ("t5", "off", BOTH),
    ("transformer", "auto", f"{TOKENS}|.*mlp/.*/kernel"),
]


def close(found: Any, expected: Any, share: float = ROUNDING) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=share * np.abs(expected).max())


def begun(kind: str, inputs: int, **fields: Any) -> Any:
    """A new adapter of a table (0) or of a head (-1)."""
    config = combinations.config_of("gpt", lora__rank=RANK, lora__alpha=SCALE * RANK, **fields)
    table = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    return KINDS[kind].make(config).apply(jnp.asarray(table), inputs, jax.random.key(0))


def drawn(kind: str, inputs: int) -> tuple[Any, dict[str, np.ndarray]]:
    """The same, all of it drawn; and its arrays in float64."""
    rng = np.random.default_rng(1)
    node = jax.tree.map(lambda array: jnp.asarray(rng.uniform(0.5, 2, array.shape), jnp.float32), begun(kind, inputs))
    return node, {name: np.asarray(array, np.float64) for name, array in tree.named_leaves({"": node})}


def formula(kind: str, inputs: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[V, D]: W + s (A B)^T of a head, whose lengths are of its rows; W + s A B of a table, whose lengths are of its columns."""
    given = {name.strip("/"): array for name, array in arrays.items()}
    product = SCALE * given["a"] @ given["b"]
    whole = given["base"] + (product.T if inputs else product)
    if kind == "dora":
        axis = 1 if inputs else 0
        whole = whole * np.expand_dims(given["magnitude"] / np.linalg.norm(whole, axis=axis), axis)
    return whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [0, -1])
def test_what_is_looked_up_and_multiplied(kind: str, inputs: int) -> None:
    """Rows by their ids, and x times all of them, of a table that is read as a head, too; and in both of them what bfloat16 makes of it."""
    node, arrays = drawn(kind, inputs)
    whole, x = formula(kind, inputs, arrays), np.random.default_rng(2).normal(size=(2, 5, WIDTH)).astype(np.float32)
    assert node.shape == (VOCAB, WIDTH) and node.outputs_first == bool(inputs)
    close(leaf.dense(node), whole)
    for spec, given in (("BTD,VD->BTV", x), ("BD,VD->BV", x[0])):
        close(leaf.einsum(spec, given, node), given.astype(np.float64) @ whole.T)
        assert leaf.einsum(spec, given.astype(jnp.bfloat16), node).dtype == jnp.bfloat16
    if inputs == 0:
        ids = np.array([[3, 10, 0], [3, 3, 7]])
        close(leaf.take(node, ids, jnp.float32), whole[ids])
        assert leaf.take(node, ids, jnp.bfloat16).dtype == jnp.bfloat16
        seen = np.asarray(leaf.take(node, np.array([VOCAB - 1, VOCAB]), jnp.float32))
        assert np.isfinite(seen[0]).all() and np.isnan(seen[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_look_up_are_those_of_one_hot_rows(kind: str) -> None:
    """Hu et al. 2021, eq. 3, and Liu et al. 2024, eq. 11, with x a row of zeros and a 1; the length is a constant."""
    node, arrays = drawn(kind, 0)
    given, ids = {name.strip("/"): array for name, array in arrays.items()}, np.array([3, 10, 3, 0])
    g = np.random.default_rng(3).normal(size=(len(ids), WIDTH)).astype(np.float32)
    _, backward = jax.vjp(lambda node: leaf.take(node, ids, jnp.float32), node)
    (found,) = backward(g)
    one_hot = np.eye(VOCAB)[ids]
    inside = given["base"] + SCALE * given["a"] @ given["b"]
    length = np.linalg.norm(inside, axis=0)
    factor = given["magnitude"] / length if kind == "dora" else np.ones(WIDTH)
    close(found.base, one_hot.T @ (g * factor))
    close(found.a, SCALE * one_hot.T @ (g * factor) @ given["b"].T)
    close(found.b, SCALE * given["a"].T @ one_hot.T @ (g * factor))
    if kind == "dora":
        close(found.magnitude, (g * inside[ids]).sum(0) / length)


@pytest.mark.parametrize("kind", KINDS)
def test_how_they_begin(kind: str) -> None:
    """A row that no batch reads stays what it was: A of a table is zero; of a head B is."""
    table, head = begun(kind, 0), begun(kind, -1)
    assert not table.a.any() and table.a.shape == (VOCAB, RANK) and (table.b != 0).all() and table.b.shape == (RANK, WIDTH)
    assert not head.b.any() and head.b.shape == (RANK, VOCAB) and head.a.shape == (WIDTH, RANK)
    assert all(0.5 < np.abs(array).max() * WIDTH**0.5 <= 1 for array in (head.a, table.b))
    if kind == "dora":
        close(table.magnitude, np.linalg.norm(np.asarray(table.base, np.float64), axis=0))
        close(head.magnitude, np.linalg.norm(np.asarray(head.base, np.float64), axis=1))
    for node in (table, head):
        np.testing.assert_array_equal(leaf.dense(node), node.base)


@pytest.mark.parametrize("inputs", [0, -1])
def test_pissa(inputs: int) -> None:
    node, whole = begun("lora", inputs, lora__init="pissa"), begun("lora", inputs).base
    close(leaf.dense(node), whole)
    values = np.linalg.svd(np.asarray(whole, np.float64), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(node.base), np.linalg.norm(values[RANK:]), rtol=1e-5)


def build(family: str, tied: str, targets: str, transforms: tuple[str, ...], **more: Any) -> tuple[Any, Any]:
    """(config, model)"""
    given = {
        "model__tied_head": tied,
        "train__transforms": transforms,
        "lora__targets": targets,
        "lora__rank": 4,
        "lora__alpha": 4.0,
    }
    sizes = {"model__layers": 2, "model__layers_as": "scan", "model__width": 64, "model__mlp_width": 256, "train__batch_seqs": 4}
    config = combinations.config_of(family, **(sizes | given | more))
    return config, models.build(config)


@pytest.mark.parametrize(
    ("family", "tied", "targets", "kind"), [*((*each, "lora") for each in MODELS), *((*each, "dora") for each in MODELS[:3])]
)
def test_a_model_is_what_it_was_and_what_it_is_merged_into(family: str, tied: str, targets: str, kind: str) -> None:
    """A new adapter moves no bit of the logits (DoRA: rounding); drawn at random it does what the merged weights do, loss and all."""
    config, model = build(family, tied, targets, (kind,))
    plain_config, plain = build(family, tied, targets, ())
    batch = combinations.batch_of(family, rows=4)
    beside = {name: batch[name] for name in ("inputs", "token_types") if name in batch}
    run, run_plain = (jax.jit(partial(each.apply, **beside)) for each in (model, plain))
    before = run_plain(plain.init(jax.random.key(0)), batch["tokens"])
    new = run(model.init(jax.random.key(0)), batch["tokens"])
    assert np.abs(new - before).max() <= (0 if kind == "lora" else 2e-6) * np.abs(before).max()
    params = combinations.parameters(model)
    merged = adapt.merged(params)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.init(jax.random.key(0)))
    close(run(params, batch["tokens"]), run_plain(merged, batch["tokens"]), 1e-5)
    # The gradients are those of the loss of merged weights, with A and B as what they are made of.
    of_model, of_plain = objective.make(model, config), objective.make(plain, plain_config)
    found = jax.jit(jax.grad(lambda params: of_model(params, batch, None)[0].total))(params)
    expected = dict(
        tree.named_leaves(jax.jit(jax.grad(lambda params: of_plain(adapt.merged(params), batch, None)[0].total))(params))
    )
    trained = adapt.adapters(model.axes)
    for name, array in tree.named_leaves(found):
        if name in trained:
            close(array, expected[name], 2e-5)
    assert {f"{name}/a" for name in BOTH.split("|") if re.fullmatch(targets, name)} <= trained


@pytest.mark.parametrize(("family", "tied", "targets"), [MODELS[0], MODELS[2], MODELS[6]])
def test_only_a_and_b_hold_optimizer_state(family: str, tied: str, targets: str) -> None:
    """Beside quantized kernels, too, whose form is no matter of the tables."""
    config, model = build(family, tied, f"{targets}|.*layers/.*/kernel", ("nf4", "lora"), data__source="synthetic")
    made = session.build_session(config, plan.make(config, jax.devices()[:1]))
    trained = set(tree.names(made.abstract.params))
    assert (
        trained == adapt.adapters(model.axes) and {f"{name}/{part}" for name in targets.split("|")[:1] for part in "ab"} <= trained
    )
    numbers = session.count(made.abstract.params)
    assert session.count(made.abstract.opt_state) in (2 * numbers, 2 * numbers + 1)
    # A of a kernel moves after B, B of a table after A.
    moves = made.first_moves
    assert all(moves.get(name, 1) == (2 if name.endswith("/b" if name.startswith("embed") else "/a") else 1) for name in trained)
    dropping, _ = build(family, tied, targets, ("lora",), data__source="synthetic", lora__dropout_frac=0.1)
    notes = session.build_session(dropping, plan.make(dropping, jax.devices()[:1])).notes()
    assert any(f"lora.dropout_frac = 0.1 drops nothing at {targets.partition('|')[0]}" in note for note in notes)
    begun, tokens = model.init(jax.random.key(0)), combinations.batch_of(family, rows=4)
    beside = {"inputs": tokens["inputs"]} if "inputs" in tokens else {}
    for params in (begun, combinations.parameters(model)):
        plain = models.build(build(family, tied, targets, ())[0])
        found = jax.jit(partial(model.apply, **beside))(params, tokens["tokens"])
        close(found, jax.jit(partial(plain.apply, **beside))(adapt.merged(params), tokens["tokens"]), 1e-5)


@pytest.mark.parametrize(
    ("family", "tied", "kind", "targets", "sizes"),
    [
        ("llama", "off", "lora", BOTH, {"fsdp": 2, "tensor": 2, "zero_stage": 3}),
        ("gpt", "on", "lora", f"{TOKENS}|.*q/kernel", {"fsdp": 2, "tensor": 2, "zero_stage": 2}),
        ("llama", "off", "dora", BOTH, {"pipe": 2, "fsdp": 2, "tensor": 2, "schedule": "1f1b"}),
    ],
)
@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_trains_them_as_one_device_does(family: str, tied: str, kind: str, targets: str, sizes: dict[str, Any]) -> None:
    given = {"model__tied_head": tied, "train__transforms": (kind,), "lora__targets": targets, "lora__rank": 4, "lora__alpha": 4.0}
    on_mesh = {f"parallel__{name}": size for name, size in sizes.items()} | {"model__layers_as": "scan", "train__microbatches": 2}
    found, one = (
        combinations.run(combinations.config_of(family, model__layers=2, **given, **more), combinations.batch_of(family))
        for more in (on_mesh, {})
    )
    differ = combinations.deviations(found, one)
    assert any(name.startswith("embed/tokens/a") for name in differ)
    assert max(differ.values()) <= 1e-5, differ
