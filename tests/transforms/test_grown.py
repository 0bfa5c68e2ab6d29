"""New tokens of a frozen table: beside the same table in one piece, as embedding and as head, on one device and on meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import combinations

from jaxllm import models
from jaxllm.engine import state
from jaxllm.transforms import grown, leaf, tree

OLD, VOCAB = 60, combinations.VOCAB
TABLES = {"gpt": ["embed/tokens"], "llama": ["embed/tokens", "head/kernel"]}  # tied and untied


def test_a_grown_table_is_the_table() -> None:
    rng = np.random.default_rng(0)
    table, x, ids = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32), np.arange(7)[None]
    node, spec = grown.Grown(table[:5], table[5:]), "BTD,VD->BTV"
    assert node.shape == (7, 4)
    np.testing.assert_array_equal(leaf.dense(node), table)
    np.testing.assert_array_equal(leaf.take(node, ids, jnp.bfloat16), table[None].astype(jnp.bfloat16))
    np.testing.assert_allclose(leaf.einsum(spec, x, node), x @ table.T, atol=1e-6)
    # Beyond all rows there is nothing, rather than a wrong row.
    seen = np.asarray(leaf.take(node, np.array([4, 5, 6, 7, 1000]), jnp.float32))
    assert np.isnan(seen[3:]).all() and np.isfinite(seen[:3]).all()
    # A row is read twice: as an embedding the gradient is summed, and new rows have none of old ones.
    twice = np.array([[0, 4, 5, 5]])
    gradient = jax.grad(lambda node: jnp.sum(leaf.take(node, twice, jnp.float32) * jnp.arange(1.0, 5.0)[None, :, None]))(node)
    np.testing.assert_array_equal(gradient.base[:, 0], [1, 0, 0, 0, 2])
    np.testing.assert_array_equal(gradient.rows[:, 0], [7, 0])
    narrow = grown.Grown(table[:5].astype(jnp.bfloat16), table[5:])
    assert leaf.dense(narrow).dtype == jnp.float32
    np.testing.assert_array_equal(leaf.take(narrow, np.array([6]), jnp.float32)[0], table[6])


def config_of(family: str, rows: int = OLD, **more: Any) -> Any:
    given = {"train__transforms": ("lora",), "lora__rank": 4, "lora__alpha": 4.0, "model__start_rows": rows, "model__layers": 2}
    return combinations.config_of(family, **(given | more))


def gradients(config: Any) -> tuple[Any, dict[str, np.ndarray]]:
    found = combinations.run(config, combinations.batch_of(config.model.name))
    return found, dict(tree.named_leaves(found.gradients))


@pytest.mark.parametrize("family", TABLES)
def test_gradients_are_those_of_the_table_in_one_piece(family: str) -> None:
    """Of all rows where the old ones are trained, too. `combinations.parameters` draws both the same numbers."""
    names = TABLES[family]
    whole, of_whole = gradients(config_of(family, rows=0, lora__also="|".join(names)))
    cut, of_cut = gradients(config_of(family, lora__also="|".join(f"{name}/base" for name in names)))
    np.testing.assert_allclose(cut.mean.total, whole.mean.total, rtol=1e-6)
    for name in names:
        joined = np.concatenate([of_cut.pop(f"{name}/base"), of_cut.pop(f"{name}/rows")])
        expected = of_whole.pop(name)
        np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert of_cut.keys() == of_whole.keys()


@pytest.mark.parametrize(
    ("family", "new_rows", "sizes"),
    [
        ("llama", 5, {"parallel__tensor": 2}),
        ("gpt", VOCAB - OLD, {"parallel__fsdp": 2, "parallel__tensor": 2, "parallel__zero_stage": 3, "model__layers_as": "scan"}),
    ],
)
@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_trains_the_new_rows_as_one_device_does(family: str, new_rows: int, sizes: dict[str, Any]) -> None:
    """However many they are: no axis of the mesh divides them."""
    vocab_size = {"model__vocab_size": OLD + new_rows}
    one, named = gradients(config_of(family, **vocab_size))
    assert {name for name in named if not name.startswith("layers")} == {f"{name}/rows" for name in TABLES[family]}
    found = combinations.deviations(gradients(config_of(family, **vocab_size, **sizes))[0], one)
    assert max(found.values()) <= 1e-5, found


def test_where_nothing_is_grown() -> None:
    """Without new tokens, without adapters, and at a head that has no tokens."""
    for fields in ({"rows": VOCAB}, {"train__transforms": ()}):
        assert not any("/rows" in name for name in tree.names(models.build(config_of("gpt", **fields)).axes))
    config = config_of("bert")
    config.model.head, config.model.classes = "classify", 3
    config.lora.also = "head/.*"
    axes = models.build(config).axes
    trained = state.trainable(config, axes)
    assert {"embed/tokens/rows", "head/kernel", "head/bias"} <= trained and "head/kernel/rows" not in tree.names(axes)
