"""Quantized models out to files of every format and back, for every family."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from foreign_models import MODELS
from quantized_models import quantized

from jaxllm.interop import directory, weights
from jaxllm.transforms import leaf
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Params

# format -> (kind, fields of its grid, whether it has to be forced)
FORMATS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "pack-quantized": ("pack-quantized", "grid", {}, False),
    "pack-quantized 8 bits": ("pack-quantized", "grid", {"bits": 8, "group": 0}, False),
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


def dense(params: Params) -> Params:
    return jax.tree.map(lambda node: np.asarray(leaf.dense(node)), params, is_leaf=lambda node: isinstance(node, Quantized))


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
