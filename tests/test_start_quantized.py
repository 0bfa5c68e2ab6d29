"""Training that begins with quantized files of other tools: adapters stand beside their codes; without adapters they are dense."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from begun import begin, config_of

from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.interop import directory, weights
from jaxllm.transforms import adapt, tree
from jaxllm.transforms.quantized import Quantized

sys.path.append(str(Path(__file__).resolve().parent / "interop"))

import quantized_models  # noqa: E402
from foreign_models import MODELS  # noqa: E402


def write(path: Path, case: str, packing: str, kind: str, **grid: Any) -> Any:
    """The parameters of what is written."""
    tokenizer = ByteTokenizer()
    _, model, params = quantized_models.quantized(MODELS[case][1], kind, vocab_size=tokenizer.vocab_size, **grid)
    directory.write(path, params, model.config, tokenizer, {}, packing=packing)
    return params


@pytest.mark.parametrize("form", ["scan", "unrolled"])
@pytest.mark.parametrize(
    ("case", "packing", "kind", "grid", "name"),
    [
        ("llama", "gptq", "grid", {"ordered": True}, "int4"),
        ("gpt2", "nf4", "nf4", {}, "nf4"),
        ("llama", "int-quantized", "int8", {}, "int8"),
    ],
)
def test_adapters_stand_beside_the_codes(
    case: str, packing: str, kind: str, grid: dict[str, Any], name: str, form: str, tmp_path: Path
) -> None:
    source = tree.stack_layers(write(tmp_path / "model", case, packing, kind, **grid))
    config = config_of(tmp_path / "model", model__layers_as=form, train__transforms=("lora",), lora__rank=2)
    session, params, said = begin(config, tmp_path)
    assert session.config.train.transforms == (name, "lora") and "kept in their codes" in said
    layers = tree.stack_layers(params)["layers"]
    for sub, kernel in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        base = layers[sub][kernel]["kernel"].base
        assert isinstance(base, Quantized)
        # Of int-quantized files what the kernels multiply is rounded, too: the same arrays in a leaf that says so.
        expected = jax.tree.leaves(source["layers"][sub][kernel]["kernel"])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(base), expected)


def test_without_adapters_it_is_dense(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", "gptq", "grid")
    session, params, said = begin(config_of(tmp_path / "model"), tmp_path)
    assert session.config.train.transforms == () and "read as dense ones" in said
    expected = weights.load(directory.read(tmp_path / "model")).params
    jax.tree.map(np.testing.assert_array_equal, tree.stack_layers(params), tree.stack_layers(expected))
    with pytest.raises(ValueError, match=r"contradicts the codes of the model[\s\S]*there \('int4',\)"):
        begin(config_of(tmp_path / "model", train__transforms=("nf4", "lora")), tmp_path)


def test_what_no_transform_has_codes_for_is_dense(tmp_path: Path) -> None:
    """Kernels that are quantized in some layers alone."""
    _, model, params = quantized_models.quantized(MODELS["llama"][1], "grid", vocab_size=ByteTokenizer().vocab_size)
    params["layers"][1]["mlp"]["up"]["kernel"] = params["layers"][1]["mlp"]["up"]["kernel"].dense()
    directory.write(tmp_path / "model", params, model.config, ByteTokenizer(), {}, packing="pack-quantized")
    session, found, _ = begin(config_of(tmp_path / "model", train__transforms=("lora",), lora__rank=2), tmp_path)
    assert session.config.train.transforms == ("lora",) and adapt.adapters(found)
