"""Whole layers compressed by every method: errors beside those of the nearest codes, and the model that comes out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_walk import FAMILIES, batches_of, build, hidden, seen

from jaxllm.compression import methods, walk
from jaxllm.compression.report import KernelError
from jaxllm.transforms import adapt, tree
from jaxllm.transforms.affine import Affine, Grid
from jaxllm.transforms.int8 import Int8

GRID = Grid(3, 0, symmetric=False)
CASES = [
    ("nearest", GRID),
    ("clip", GRID),
    ("gptq", GRID),
    ("gptq", Grid(4, 8, ordered=True)),
    ("awq", GRID),
    ("awq+gptq", GRID),
    ("smoothquant", Grid(8, 0)),
]


def compress(family: str, method: str, grid: Grid) -> tuple[Any, Any, Any, list[KernelError], list[Any]]:
    """(model, parameters before, after, errors, batches)."""
    model, params = build(family, width=32)
    before, found = jax.tree.map(jnp.asarray, params), list[KernelError]()
    recipe = methods.Recipe(method, grid, "group" if grid.ordered else "static")
    batches = batches_of(model, 6)
    after = walk.walk(model, params, batches, methods.make(recipe, model.config, lambda name, site: True, found))
    return model, before, after, found, batches


@pytest.mark.parametrize(("method", "grid"), CASES)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_errors_are_those_of_the_model_that_comes_out(family: str, method: str, grid: Grid) -> None:
    """Every kernel is replaced; the errors of the first layer by hand; the methods that fit to data leave smaller ones than the nearest."""
    model, before, after, found, batches = compress(family, method, grid)
    kernels = [name for name, _ in tree.named_leaves(before) if name.endswith("/kernel") and "layers" in name.split("/")]
    assert sorted(each.name for each in found) == sorted(kernels)
    stack = model.stacks[0]
    first = tree.get(after, stack.path)[0]
    leaf = walk.kernel_of(first, "attention/q")
    assert isinstance(leaf, Int8 if method == "smoothquant" else Affine)
    # What the first projection reads is the norm of the embedding, with padding left out.
    reached = [walk._Reached(batch) for batch in batches]
    runner = walk._Runner(stack)
    for each in reached:
        each.x = stack.enter(before, each.batch, None)
    site = walk.Site(runner, 0, 0, walk._without_layers(before, model), reached)
    one = tree.get(before, stack.path)[0]
    hessian = np.asarray(site.moments(one, "attention/q").second_II, np.float64)
    matrix = np.asarray(walk.kernel_of(one, "attention/q"), np.float64).reshape(len(hessian), -1)
    scale = np.asarray(tree.get(one, ("attention", "norm", "scale")) / tree.get(first, ("attention", "norm", "scale")), np.float64)
    off = np.asarray(leaf.dense(), np.float64).reshape(matrix.shape) / scale[:, None] - matrix
    error = np.sqrt(np.trace(off.T @ hessian @ off) / np.trace(matrix.T @ hessian @ matrix))
    mine = next(each for each in found if each.name.endswith("attention/q/kernel") and each.layer == 0)
    np.testing.assert_allclose(mine.error, error, rtol=1e-3)
    total, nearest = sum(each.error for each in found), sum(each.nearest for each in found)
    if method == "nearest":
        assert total == pytest.approx(nearest)
    elif method != "smoothquant":
        assert total < nearest * {"clip": 1.0, "awq": 0.98}.get(method, 0.9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "bits"), [("awq+gptq", 8), ("smoothquant", 8)])
def test_eight_bits_are_close_to_the_model(family: str, method: str, bits: int) -> None:
    """Scales folded away, codes in place: the outputs of every family are those of the dense model but for what 8 bits lose."""
    model, before, after, _, batches = compress(family, method, Grid(bits, 0))
    there = seen(batches[0])
    expected, found = (np.asarray(hidden(model, params, batches[0]))[there] for params in (before, after))
    change = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # T5's scores have no 1 / sqrt(head width): its attention is sharp, and small errors decide where it looks.
    assert 1e-5 < change < (0.3 if family.startswith("t5") else 0.06)
    dense = np.asarray(hidden(model, adapt.merged(after), batches[0]))[there]
    if method != "smoothquant":
        np.testing.assert_allclose(dense, found, atol=1e-5 * np.abs(expected).max() * 5)


def test_only_what_is_chosen_is_compressed() -> None:
    model, params = build("llama", width=32)
    found: list[KernelError] = []
    compress = methods.make(methods.Recipe("awq", GRID), model.config, lambda name, site: name == "mlp/down", found)
    layer = tree.get(walk.walk(model, params, batches_of(model), compress), ("layers",))[0]
    assert {each.name for each in found} == {"layers/mlp/down/kernel"}
    assert isinstance(walk.kernel_of(layer, "mlp/down"), Affine) and isinstance(walk.kernel_of(layer, "mlp/up"), jax.Array)


def test_nf4() -> None:
    """In blocks of 64 inputs, which the tiny models have not."""
    with pytest.raises(ValueError, match="nf4 cannot cut the inputs"):
        compress("gpt", "nf4", GRID)
