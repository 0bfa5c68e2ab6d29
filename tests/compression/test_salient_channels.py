"""benchmarks/salient_channels.py where it is known what rounding does: one input is large, and only its weights are no codes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import batches, draw, tiny

from jaxllm import models
from jaxllm.transforms import tree
from jaxllm.transforms.affine import Grid
from jaxllm.types import Model, Params

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import salient_channels

GRID, STEP, LARGE = Grid(3, 0, symmetric=False), 2.0**-4, 5
# Kernels that read what a norm gives.
BEHIND_NORM = ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up")


def made(layers_as: str) -> tuple[Model, Params]:
    """All weights are codes (-3 .. 4 times a power of two, both ends in each output), but for those of input LARGE, a quarter of a step,
    which go to 0. The norms make that input a hundred times as large as the others."""
    model, rng = models.build(tiny("llama", bias="off", layers_as=layers_as)), np.random.default_rng(3)

    def one(path: object, leaf: jax.Array) -> jax.Array:
        name = tree.path_name(path)
        if "layers" not in name.split("/"):
            return jnp.abs(leaf) + 0.1
        if not name.endswith("/kernel"):
            return jnp.ones_like(leaf).at[..., LARGE].set(100.0)
        lead = leaf.ndim - 2 - ("attention" in name)
        inputs = 2 if name.endswith("/o/kernel") else 1
        codes = rng.integers(
            -3, 5, (*leaf.shape[:lead], int(np.prod(leaf.shape[lead : lead + inputs])), *leaf.shape[lead + inputs :])
        )
        ends = np.moveaxis(codes, lead, 0)
        ends[0], ends[1] = -3, 4
        weights = codes * STEP
        if any(part in name for part in BEHIND_NORM):
            np.moveaxis(weights, lead, 0)[LARGE] = STEP / 4
        return jnp.asarray(weights.reshape(leaf.shape), jnp.float32)

    return model, jax.tree.map_with_path(one, draw(model))


def test_an_input_is_kept_or_its_product_is_lost() -> None:
    """By hand: x (W - Q) is x_5 times a quarter of a step where input 5 goes to 0, and 0 where it is kept."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-3, 5, (16, 3))
    codes[0], codes[1] = -3, 4
    kernel_IO = (codes * STEP).astype(np.float32)
    kernel_IO[LARGE] = STEP / 4
    x_I = rng.normal(size=16).astype(np.float32)
    x_I[LARGE] = 100.0

    def off(worth_I: np.ndarray | None) -> np.ndarray:
        return x_I @ (kernel_IO - np.asarray(salient_channels.rounded(jnp.asarray(kernel_IO), GRID, worth_I)))

    np.testing.assert_array_equal(off(None), [100 * STEP / 4] * 3)
    np.testing.assert_array_equal(off(np.abs(x_I)), [0.0] * 3)
    np.testing.assert_array_equal(off(np.linalg.norm(kernel_IO, axis=1)), [100 * STEP / 4] * 3)


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_only_the_size_of_what_is_read_rescues(layers_as: str) -> None:
    """Kept by mean |x|, the model is what it was, bit for bit; otherwise all weights of the large input are gone in all kernels that
    read it, but where chance has kept them."""
    model, params = made(layers_as)
    # By place, as unrolled layers repeat their names.
    before = list(enumerate(tree.named_leaves(params)))
    sizes = salient_channels.measure_sizes(model, params, batches("llama"))
    assert {int(jnp.argmax(size_I)) for (_, name), size_I in sizes.items() if name.startswith(BEHIND_NORM)} == {LARGE}

    def changed(choice: str | None) -> dict[int, float]:
        """Of the leaves that changed the largest difference."""
        after = jax.tree.leaves(salient_channels.compress(model, params, sizes, GRID, choice))
        return {at: float(jnp.abs(after[at] - leaf).max()) for at, (_, leaf) in before if (after[at] != leaf).any()}

    lost = changed(None)
    kernels = [at for at, (name, _) in before if name.endswith("/kernel") and any(part in name for part in BEHIND_NORM)]
    assert lost == dict.fromkeys(kernels, STEP / 4)
    assert changed("mean |x|") == {}
    assert changed("norm of the weights") == lost
    assert 0.6 * len(kernels) < len(changed("any")) <= len(kernels)
    # The model that was given keeps its own arrays.
    assert all(leaf is before[at][1][1] for at, leaf in enumerate(jax.tree.leaves(params)))
