"""Scales that go from a kernel's inputs into what makes them: the layer does what it did, and its kernels read what they are said to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import batches, draw, tiny

from jaxllm import models
from jaxllm.compression.folds import Fold, find, fold
from jaxllm.compression.statistics import Statistics
from jaxllm.compression.walk import Site, walk
from jaxllm.types import Params

NORMS = [("attention/norm", "attention/q attention/k attention/v"), ("mlp/norm", "mlp/up")]
GATED = [("mlp/norm", "mlp/gate mlp/up"), ("mlp/up", "mlp/down")]
V, CROSS = ("attention/v", "attention/o"), [("cross/norm", "cross/q"), ("cross/v", "cross/o")]
# (family, fields of its model, what can be folded in an encoder's or decoder's layer, and in a layer of a decoder beside an encoder)
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]], list[tuple[str, str]]]] = {
    "gpt": ("gpt", {}, [NORMS[0], V, NORMS[1]], []),
    "gpt_relu": ("gpt", {"activation": "relu"}, [NORMS[0], V, NORMS[1], GATED[1]], []),
    "llama": ("llama", {}, [NORMS[0], V, *GATED], []),
    "llama_biased": ("llama", {"bias": "on", "norm": "layernorm", "kv_heads": 1}, [NORMS[0], V, *GATED], []),
    "bert": ("bert", {}, [V], []),
    "t5": ("t5", {}, [NORMS[0], V, NORMS[1], GATED[1]], [NORMS[0], V, *CROSS, NORMS[1], GATED[1]]),
    "t5_v1_1": ("t5", {"activation": "geglu", "head_dim": 6}, [NORMS[0], V, *GATED], [NORMS[0], V, *CROSS, *GATED]),
    "transformer": ("transformer", {}, [V, GATED[1]], [V, CROSS[1], GATED[1]]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folded_layer_does_what_it_did(case: str) -> None:
    """Every fold of every layer at once, with its own scales in [0.2, 5]; each kernel then reads what it read, divided by them."""
    family, fields, own, beside_encoder = CASES[case]
    model = models.build(tiny(family, **fields))
    params, rng = draw(model), np.random.default_rng(2)
    reads: list[dict[int, dict[str, Statistics]]] = [{}, {}]
    scales: dict[int, dict[str, np.ndarray]] = {}

    def note(turn: int, layer: Params, site: Site) -> None:
        found = {group: site.statistics(layer, group) for group in site.groups}
        reads[turn][site.number] = {name: found[group] for group in site.groups for name in group}

    def prepare(layer: Params, site: Site) -> Params:
        note(0, layer, site)
        chosen = find(model.config, layer)
        expected = beside_encoder if "cross" in layer else own
        assert [(each.sources[0].rpartition("/")[0], " ".join(each.kernels).replace("/kernel", "")) for each in chosen] == expected
        scales[site.number] = {}
        for each in chosen:
            outer, _, inner = each.shape
            scales_S = jnp.asarray(np.exp(rng.uniform(np.log(0.2), np.log(5), outer * inner)), jnp.float32)
            layer = fold(layer, each, scales_S)
            scales[site.number] |= dict.fromkeys(each.kernels, np.asarray(each.spread(scales_S)))
        return layer

    def only_look(layer: Params, site: Site) -> Params:
        note(1, layer, site)
        return layer

    folded = walk(model, draw(model), batches(family), prepare)
    walk(model, jax.tree.map(lambda leaf: leaf, folded), batches(family), only_look)
    batch = batches(family)[0]
    beside = {name: x for name, x in batch.items() if name != "tokens"}
    before, after = (np.asarray(jax.jit(model.apply)(each, batch["tokens"], **beside)) for each in (params, folded))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    for layer, found in reads[0].items():
        for name, each in found.items():
            expected = each.absolute_I / scales[layer].get(name, 1)
            np.testing.assert_allclose(reads[1][layer][name].absolute_I, expected, rtol=1e-4, err_msg=f"{name} {layer}")


def test_query_heads_that_share_a_value_head_share_its_scales() -> None:
    """By hand: 2 value heads of width 3, each read by 2 query heads, as attention repeats them (0, 0, 1, 1)."""
    model = models.build(tiny("llama", head_dim=6, kv_heads=2))
    each = find(model.config, draw(model)["layers"][0])[1]
    assert (each.kernels, each.shape) == (("attention/o/kernel",), (2, 2, 6))
    two = Fold((), (), (2, 2, 3))
    sizes_I = jnp.asarray([1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 1, 2.0])
    np.testing.assert_array_equal(two.join(sizes_I, jnp.max), [4, 2, 6, 7, 8, 9])
    np.testing.assert_array_equal(two.join(sizes_I, jnp.mean), [2.5, 1, 4.5, 3.5, 4.5, 5.5])
    np.testing.assert_array_equal(two.spread(jnp.arange(6.0)), [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
