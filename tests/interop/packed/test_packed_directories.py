"""Quantized models out to files of every format and back, for every family."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from foreign_models import MODELS
from quantized_models import quantized

from jaxllm import models
from jaxllm.interop import directory, weights
from jaxllm.transforms import leaf, tree
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Params

# format -> (kind, fields of its grid, whether it has to be forced)
FORMATS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "pack-quantized": ("pack-quantized", "grid", {}, False),
    "pack-quantized 8 bits": ("pack-quantized", "grid", {"bits": 8, "group": 0}, False),
    "pack-quantized 3 bits, zeros": ("pack-quantized", "grid", {"bits": 3, "symmetric": False}, False),
    "pack-quantized zeros": ("pack-quantized", "grid", {"symmetric": False}, False),
    "pack-quantized order": ("pack-quantized", "grid", {"ordered": True}, True),
    "int-quantized": ("int-quantized", "int8", {}, False),
    "gptq": ("gptq", "grid", {}, False),
    "gptq order": ("gptq", "grid", {"ordered": True}, False),
    "gptq 2 bits, zeros": ("gptq", "grid", {"bits": 2, "symmetric": False}, True),
    "gptq_v2": ("gptq_v2", "grid", {"symmetric": False, "ordered": True}, True),
    "awq": ("awq", "grid", {"symmetric": False}, False),
    "awq symmetric": ("awq", "grid", {"group": 0}, False),
    "nf4": ("nf4", "nf4", {}, False),
    "nf4 double": ("nf4", "double", {}, False),
}


def is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def dense(params: Params) -> Params:
    return jax.tree.map(lambda node: np.asarray(leaf.dense(node)), params, is_leaf=is_quantized)


@pytest.mark.parametrize("case", ["gpt2", "llama tied", "bert classes", "t5 1.1"])
@pytest.mark.parametrize("name", FORMATS)
def test_out_and_back(name: str, case: str, tmp_path: Path) -> None:
    """What is read is what the codes stand for, bit for bit."""
    packing, kind, grid, forced = FORMATS[name]
    _, model, params = quantized(MODELS[case][1], kind, **grid)
    forced |= case == "gpt2" and packing in ("pack-quantized", "int-quantized") or case == "t5 1.1" and packing == "nf4"
    directory.write(tmp_path, params, model.config, None, {}, packing=packing, forced=forced)
    imported = directory.read(tmp_path)
    loaded = weights.load(imported)
    assert loaded.unused == ()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, dense(params))
    values = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert values


# What a transform here has codes for.
KEPT = [name for name in FORMATS if "2 bits" not in name]


@pytest.mark.parametrize(
    ("case", "layers_as"), [("gpt2", "scan"), ("llama tied", "unrolled"), ("bert classes", "scan"), ("t5 1.1", "unrolled")]
)
@pytest.mark.parametrize("name", KEPT)
def test_codes_are_kept(name: str, layers_as: str, case: str, tmp_path: Path) -> None:
    """The kernels that were written come back, array for array, and are those that the transforms of the config make a place for."""
    packing, kind, grid, _ = FORMATS[name]
    _, model, params = quantized(MODELS[case][1], kind, **grid)
    directory.write(tmp_path, params, model.config, None, {}, packing=packing, forced=True)
    imported = directory.read(tmp_path, keep_codes=True)
    imported.config.model.layers_as = layers_as
    loaded = weights.load(imported).params
    template = jax.eval_shape(models.build(imported.config).init, jax.random.key(0))
    jax.tree.map(lambda x, like: np.testing.assert_equal((x.shape, x.dtype), (like.shape, like.dtype)), loaded, template)
    stacked = layers_as == "scan"
    jax.tree.map(
        np.testing.assert_array_equal, layer_by_layer(loaded), tree.stack_layers(dense(params)) if stacked else dense(params)
    )
    expected = tree.stack_layers(params) if stacked else params
    if jax.tree.structure(loaded) == jax.tree.structure(expected):
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    else:  # AWQ stores all zeros, 8 bits an output are Int8, also for rounded activations, and joined kernels have scales of their own
        assert packing in ("awq", "int-quantized") or grid.get("bits") == 8 or (case, kind) == ("gpt2", "double")


def layer_by_layer(params: Params) -> Params:
    """Dense, each kernel by a program of its own: in a larger one products and sums are rounded together."""

    def one(path: Any, node: Any) -> Any:
        if is_quantized(node) and tree.is_stacked(path):
            return np.stack([leaf.dense(jax.tree.map(lambda x, index=index: x[index], node)) for index in range(2)])
        return np.asarray(leaf.dense(node))

    return jax.tree.map_with_path(one, params, is_leaf=is_quantized)
