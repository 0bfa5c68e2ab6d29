"""Packed examples train as if each had a row to itself, and no example tells another anything: in every kind of model."""

from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm import models, registry
from jaxllm.data import fill
from jaxllm.data.examples.contract import count_positions, shift_right
from jaxllm.objectives import tokens
from jaxllm.transforms import tree
from jaxllm.types import Params

VOCAB, WIDTH, INPUTS, START = 24, 24, 20, 23
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt"},
    "llama": {"name": "llama", "kv_heads": 2},
    "bert": {"name": "bert"},
    "t5": {"name": "t5", "relative_buckets": 8, "relative_max_tokens": 6},
    "transformer": {"name": "transformer"},
}
TWO_SIDED = ("t5", "transformer")
# `splash` is for TPUs and leaves its work to `blocked` here; ops/attention/test_attention.py tests its kernel.
BACKENDS = [name for name in registry.names("attention") if name != "splash"]
SIZES = (5, 9, 1, 12, 4, 7, 10, 3)


def tiny(family: str, attention: str) -> ConfigDict:
    config = schema.base()
    sizes = {"vocab_size": VOCAB, "layers": 1, "width": 16, "heads": 4, "context_tokens": WIDTH, "attention_block_tokens": 8}
    # A kernel of its own, so that the gradient of an embedding comes from where its token is read.
    config.model.update({**sizes, **FAMILIES[family], "attention": attention, "tied_head": "off"})
    config.train.loss_chunk_tokens = 16
    return config


def example(family: str, size: int, seed: int, first: int = 0, last: int = START) -> tuple[fill.Side, ...]:
    """Random ids from `first` on and below `last`; a third of the predictions do not count."""
    rng = np.random.default_rng(seed)
    side = {
        "tokens": rng.integers(first, last, size),
        "targets": rng.integers(first, last, size),
        "weights": rng.random(size) < 2 / 3,
    }
    return ({"inputs": rng.integers(first, last, size % 6 + 1)}, side) if family in TWO_SIDED else (side,)


def rows(family: str, examples: list[tuple[fill.Side, ...]]) -> dict[str, np.ndarray]:
    """A batch of packed rows, as the data sides make them."""
    names = ["input_segments", "segments"] if family in TWO_SIDED else ["segments"]
    blocks = list(fill.fill(examples, [INPUTS, WIDTH][-len(names) :], names, 0))
    batch = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    batch |= {name.replace("segments", "positions"): count_positions(batch[name]) for name in names}
    if family in TWO_SIDED:
        batch["tokens"] = shift_right(batch["targets"], batch["positions"], START)
    return batch | {"weights": batch["weights"].astype(np.float32)}


def make(family: str, attention: str = "blocked") -> tuple[Params, Any]:
    """Parameters of deviation 0.3, and batch -> (total, weight), gradient of the total."""
    config = tiny(family, attention)
    model = models.build(config)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.3 + tree.path_name(path).endswith("scale")).astype(np.float32)

    objective = tokens.make(model, config)

    @jax.jit
    def measure(params: Params, batch: dict[str, np.ndarray]) -> Any:
        def total(params: Params) -> Any:
            mean = objective(params, batch, None)[0]
            return mean.total, mean.weight

        return jax.value_and_grad(total, has_aux=True)(params)

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0))), measure


def norm(*arrays: np.ndarray) -> float:
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays)))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_train_as_if_alone(family: str) -> None:
    """Sums of the loss and of the weights, and the gradient, of three or four rows and of a row for each of eight examples."""
    params, measure = make(family)
    examples = [example(family, size, seed) for seed, size in enumerate(SIZES)]
    packed, alone = rows(family, examples), [rows(family, [each]) for each in examples]
    lone = {name: np.concatenate([each[name] for each in alone]) for name in packed}
    assert len(packed["tokens"]) < len(lone["tokens"]) == len(SIZES)
    (total, weight), gradient = measure(params, packed)
    (expected, expected_weight), slopes = measure(params, lone)
    assert weight == expected_weight == packed["weights"].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    leaves = [(np.float64(one), np.float64(other)) for one, other in zip(*map(jax.tree.leaves, (gradient, slopes)), strict=True)]
    whole = norm(*(other for _, other in leaves))
    assert norm(*(one - other for one, other in leaves)) < 1e-6 * whole
    # Each array by itself, too; that of the keys' bias is 0 but for rounding.
    for one, other in leaves:
        assert norm(one - other) < 1e-5 * norm(other) + 1e-7 * whole


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_example_tells_another_anything(family: str, attention: str) -> None:
    """The loss of the one in the middle of three, and its gradient, are equal to the bit whatever stands in the others; and the
    embeddings of what does stand there, which are read nowhere else, have a gradient of exactly 0."""
    params, measure = make(family, attention)
    middle = example(family, 8, 0, 0, 8)
    found = []
    for seed in (1, 2):
        others = [example(family, 7, seed, 8, 16), example(family, 6, seed + 2, 8, 16)]
        batch = rows(family, [others[0], middle, others[1]])
        assert len(batch["tokens"]) == 1 and batch["segments"].max() == 3
        batch["weights"] *= batch["segments"] == 2
        found.append(measure(params, batch))
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    slopes_VD = np.asarray(found[0][1]["embed"]["tokens"])
    assert slopes_VD[:8].any() and not slopes_VD[8:16].any()
