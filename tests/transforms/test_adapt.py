"""Transforms of whole parameter trees: what patterns select, that both forms of the stack agree, and the axes of what comes out."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from parallel import combinations

from jaxllm import models
from jaxllm.engine import state
from jaxllm.transforms import adapt, dora, lora, tree

KERNELS = {
    "gpt": "attention/(q|k|v|o)/kernel mlp/(up|down)/kernel",
    "llama": "attention/(q|k|v|o)/kernel mlp/(up|gate|down)/kernel",
    "bert": "attention/(q|k|v|o)/kernel mlp/(up|down)/kernel",
    "t5": "(attention|cross)/(q|k|v|o)/kernel mlp/(up|down)/kernel",
    "transformer": "(attention|cross)/(q|k|v|o)/kernel mlp/(up|down)/kernel",
}


def config_of(family: str, kind: str = "lora", **fields: Any) -> Any:
    return combinations.config_of(family, train__transforms=(kind,), **fields)


def shapes(config: Any) -> tuple[Any, Any]:
    """(model, its parameters as shapes)"""
    model = models.build(config)
    return model, jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("form", ["scan", "unrolled"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", KERNELS)
def test_axes_and_trained_names_of_every_family(family: str, kind: str, form: str) -> None:
    """Each array has an axis a dimension, equal letters are equal lengths, and what is trained are the adapters of all kernels alone."""
    config = config_of(family, kind, model__layers=2, model__layers_as=form)
    model, params = shapes(config)
    assert jax.tree.structure(model.axes, is_leaf=adapt.is_axes) == jax.tree.structure(params)
    lengths = {
        "rank": 16,
        "layers": 2,
        "embed": 32,
        "heads": 4,
        "kv_heads": 2 if family == "llama" else 4,
        "head_dim": 8,
        "mlp": 64,
    }
    for (name, axes), (_, like) in zip(tree.named_leaves(model.axes, adapt.is_axes), tree.named_leaves(params), strict=True):
        assert [lengths.get(axis, size) for axis, size in zip(axes, like.shape, strict=True)] == list(like.shape), (name, axes)
    trained = {name: name.rpartition("/") for name in state.trainable(config, model.axes)}
    every = "|".join(f"(.*/)?layers/{part}" for part in KERNELS[family].split())
    kernels = {name.removesuffix("/base") for name, _ in tree.named_leaves(params) if re.fullmatch(f"({every})/base", name)}
    assert {parent for parent, _, _ in trained.values()} == kernels
    assert len(trained) == len(kernels) * len({"lora": "ab", "dora": "abm"}[kind])
    assert {last for _, _, last in trained.values()} == {"a", "b", *(("magnitude",) if kind == "dora" else ())}


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("nothing", "lora.targets = 'nothing' selects no parameter"),
        ("embed/.*", "selects embed/positions, which no transform fits"),
        (".*mlp/.*", "selects layers/mlp/down/bias, layers/mlp/norm/bias, layers/mlp/norm/scale, layers/mlp/up/bias, which"),
    ],
)
def test_patterns_that_select_no_kernels_are_refused(pattern: str, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)) as error:
        models.build(config_of("gpt", lora__targets=pattern, model__tied_head="off"))
    kernels = "layers/attention/q/kernel, layers/attention/v/kernel, layers/mlp/down/kernel, layers/mlp/up/kernel"
    assert f"{kernels}, embed/tokens, head/kernel.\n" in str(error.value)
    assert ("name it in lora.also" in str(error.value)) == ("which no" in str(error.value))


def test_tables_take_adapters_alone() -> None:
    """No frozen form fits them, nor an adapter a head of classes, or a table whose new tokens have rows of their own."""
    with pytest.raises(ValueError, match="quant.targets = 'embed/tokens' selects embed/tokens, which no transform fits"):
        models.build(config_of("gpt", "int8", quant__targets="embed/tokens"))
    classes = config_of("bert", lora__targets="head/kernel")
    classes.model.head, classes.model.classes = "classify", 3
    with pytest.raises(ValueError, match="selects head/kernel, which no transform fits"):
        models.build(classes)
    with pytest.raises(
        ValueError, match=r"selects embed/tokens, whose new tokens have rows of their own.\n  Accepted: [\s\S]*lora.also"
    ):
        models.build(config_of("gpt", lora__targets="embed/tokens", model__start_rows=60))


def test_only_the_targets_are_adapted_and_more_is_trained_on_request() -> None:
    targets = ".*attention/(q|v)/kernel"
    model, _ = shapes(config_of("llama", lora__targets=targets))
    adapters = {f"layers/attention/{part}/kernel/{array}" for part in "qv" for array in "ab"}
    assert adapt.adapters(model.axes) == adapters
    more = {"embed/tokens", "norm/scale", "layers/attention/norm/scale", "layers/mlp/norm/scale"}
    also = config_of("llama", lora__targets=targets, lora__also="embed/.*|(.*/)?norm/.*")
    assert state.trainable(also, model.axes) == adapters | more
    own = config_of("llama", lora__targets=targets, train__trainable=".*/b")
    assert state.trainable(own, model.axes) == {name for name in adapters if name.endswith("/b")}
    with pytest.raises(ValueError, match="lora.also: pattern 'embed' selects no parameter"):
        state.trainable(config_of("llama", lora__also="embed"), model.axes)


@pytest.mark.parametrize("make", [lora.make, dora.make])
def test_both_forms_of_the_stack_draw_the_same_numbers(make: Any) -> None:
    """And no two kernels, nor two layers, the same ones."""
    config = config_of("gpt", lora__targets=".*")
    rng = np.random.default_rng(0)
    stacked = {name: rng.normal(size=(3, 6, 8)).astype(np.float32) for name in ("up", "gate")}
    unrolled = [{name: array[layer] for name, array in stacked.items()} for layer in range(3)]
    axes = ("embed", "mlp")

    def run(layers: Any, layers_axes: Any) -> Any:
        adaptation = adapt.Adaptation({"layers": layers_axes}, (make(config),))
        return adaptation.params({"layers": layers}, jax.random.key(5))

    scan = run(stacked, dict.fromkeys(stacked, ("layers", *axes)))
    loop = run(unrolled, [dict.fromkeys(stacked, axes)] * 3)
    # The lengths of DoRA are sums, which the compiler may order in another way.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=3e-7), tree.stack_layers(loop), scan)
    drawn = np.stack([scan["layers"][name].a for name in stacked]).reshape(6, -1)
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 0.5
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), adapt.merged(scan)["layers"], stacked)


def test_arrays_of_numpy_are_no_adapters() -> None:
    """They have an attribute `base` of their own."""
    assert adapt.adapters({"layers": [{"up": np.ones((2, 2))}]}) == set()
