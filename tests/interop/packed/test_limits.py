"""What is not written, unless forced, and what is said about what is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import MODELS, make
from quantized_models import quantize, quantized
from safetensors.numpy import load_file

from jaxllm.interop import directory, weights


def write(
    path: Path, case: str, packing: str, kind: str = "grid", forced: bool = False, dtype: str = "float32", **grid: Any
) -> Any:
    _, model, params = quantized(MODELS[case][1], kind, **grid)
    return directory.write(path, params, model.config, None, {}, packing=packing, forced=forced, dtype=dtype)


@pytest.mark.parametrize(
    ("case", "packing", "kind", "grid", "words"),
    [
        ("llama", "awq", "grid", {"bits": 8}, r"awq files cannot hold codes of 8 bits.\n  Accepted: 4.\n"),
        (
            "llama",
            "awq",
            "grid",
            {"ordered": True},
            r"awq files cannot hold groups that an index gives.\n  Accepted: groups that are runs",
        ),
        ("llama", "int-quantized", "grid", {"bits": 8}, r"int-quantized files cannot hold groups of inputs or zeros"),
        ("llama", "gptq", "grid", {"bits": 3, "group": 32}, r"gptq files cannot hold codes of 3 bits.\n  Accepted: 2, 4, 8"),
        (
            "llama",
            "gptq",
            "nf4",
            {},
            r"some kernels are nf4, and files of gptq are to be written.\n  Accepted: kernels in whole numbers",
        ),
        ("llama", "nf4", "grid", {}, r"no kernel is nf4, and files of nf4 are to be written.\n  Accepted: nf4 kernels"),
    ],
)
def test_what_has_no_place_is_refused_even_if_forced(
    case: str, packing: str, kind: str, grid: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for forced in (False, True):
        with pytest.raises(ValueError, match=words):
            write(tmp_path / "out", case, packing, kind, forced, **grid)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "packing", "kind", "grid", "words"),
    [
        (
            "llama",
            "gptq",
            "grid",
            {"symmetric": False},
            r"a grid with zeros is not loaded from gptq files .*\n  Accepted: a symmetric one",
        ),
        ("llama", "gptq", "grid", {"bits": 2}, r"a model in 2 bits is not loaded from gptq files .*\n  Accepted: 4, 8 \(vLLM\)"),
        ("llama", "pack-quantized", "grid", {"ordered": True}, r"an index of groups is not loaded from pack-quantized files"),
        (
            "gpt2",
            "pack-quantized",
            "grid",
            {},
            r"GPT-2, whose layers are Conv1D, is not loaded .*\n  Accepted: models of Linear layers",
        ),
        ("t5", "nf4", "nf4", {}, r"T5 with wo in nf4 is not loaded from nf4 files .*\n  Accepted: wo in float32"),
        (
            "llama",
            "gptq",
            "grid",
            {"scale_dtype": "float32"},
            r"the scales of model.layers.0.self_attn.q_proj.weight are no float16 numbers.*\n  Accepted: .* quant.scale_dtype = 'float16'",
        ),
    ],
)
def test_what_no_reader_loads_has_to_be_forced(
    case: str, packing: str, kind: str, grid: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "one", case, packing, kind, **grid)
    write(tmp_path / "two", case, packing, kind, True, **grid)
    weights.load(directory.read(tmp_path / "two"))


def test_words_that_would_not_be_full(tmp_path: Path) -> None:
    """12 outputs or inputs are no multiple of 8; compressed-tensors fills up."""
    _, model, params = make(MODELS["llama"][1])
    layer = params["layers"][0]
    layer["mlp"]["up"]["kernel"] = up = quantize(layer["mlp"]["up"]["kernel"], 1, "grid", group=0)
    for packing in ("gptq", "awq"):
        with pytest.raises(ValueError, match=r"up_proj.weight, whose 12 outputs or 8 inputs do not fill words of 8 codes"):
            directory.write(tmp_path / packing, params, model.config, None, {}, packing=packing)
    directory.write(tmp_path / "ct", params, model.config, None, {}, packing="pack-quantized")
    found = weights.load(directory.read(tmp_path / "ct")).params["layers"][0]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(found, up.dense())


def test_kernels_in_several_ways(tmp_path: Path) -> None:
    _, model, params = quantized(MODELS["llama"][1], "grid")
    _, _, others = quantized(MODELS["llama"][1], "grid", bits=8, group=16)
    params["layers"][1] = others["layers"][1]
    with pytest.raises(ValueError, match=r"codes of 4 and 8 bits in groups of 16 and 32 inputs.\n  Accepted: one way for all"):
        directory.write(tmp_path, params, model.config, None, {}, packing="pack-quantized")
    _, model, params = make(MODELS["llama"][1])
    with pytest.raises(ValueError, match=r"no kernel is quantized, and files of awq are to be written"):
        directory.write(tmp_path, params, model.config, None, {}, packing="awq")


@pytest.mark.parametrize(
    ("case", "ignored"),
    [
        ("llama", ["lm_head"]),
        ("llama tied", ["lm_head"]),
        ("llama classes", ["score", "lm_head"]),
        ("bert", ["cls.predictions.transform.dense", "cls.predictions.decoder"]),
    ],
)
def test_heads_stay_dense_and_tied_ones_are_written_once(case: str, ignored: list[str], tmp_path: Path) -> None:
    write(tmp_path, case, "pack-quantized")
    stored, values = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"]["ignore"] == ignored
    heads = {name for name in stored if any(name.startswith(f"{head}.") for head in ignored)}
    assert all(stored[name].dtype == np.float32 for name in heads)
    assert ("lm_head.weight" in heads) == (case == "llama")
    kinds = {str(x.dtype) for name, x in stored.items() if "_proj." in name or "attention" in name and "LayerNorm" not in name}
    assert kinds == {"int32", "float32", "int64"}


def test_a_quantized_head_is_written_dense(tmp_path: Path) -> None:
    _, model, params = quantized(MODELS["llama"][1], "grid")
    head = params["head"]["kernel"]
    params["head"]["kernel"] = quantize(head, 1, "grid", group=40)
    directory.write(tmp_path, params, model.config, None, {}, packing="gptq")
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], params["head"]["kernel"].dense())


def test_notes(tmp_path: Path) -> None:
    assert write(tmp_path / "a", "llama", "pack-quantized").notes == (
        "groups of 32 inputs: tensor parallelism can share the model out over 2, 4 devices",
    )
    zeros, shared = write(tmp_path / "b", "llama", "pack-quantized", group=64, symmetric=False).notes
    assert "CompressedTensorsConfig(dequantize=True)" in zeros and shared.endswith("over 2 devices")
    assert "round what these layers multiply" in write(tmp_path / "c", "llama", "int-quantized", "int8").notes[0]
    assert write(tmp_path / "d", "llama", "gptq", group=0).notes == ()
    assert "codes of 3 bits: transformers with" in write(tmp_path / "f", "llama", "pack-quantized", bits=3, group=0).notes[0]
    assert "reads T5 in this format with CompressedTensorsConfig" in write(tmp_path / "e", "t5", "pack-quantized", group=0).notes[0]


def test_shards_and_other_types(tmp_path: Path) -> None:
    """Each part counts with its own bytes; the other tensors are in the dtype that was asked for."""
    _, model, params = quantized(MODELS["llama"][1], "grid")
    written = directory.write(tmp_path, params, model.config, None, {}, packing="gptq", dtype="bfloat16", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) > 2 and set(index["weight_map"]) == set(written.shapes)
    assert sum(path.stat().st_size for path in paths) == pytest.approx(index["metadata"]["total_size"], rel=0.2)
    imported = directory.read(tmp_path)
    assert imported.tensors.dtypes["model.norm.weight"] == "bfloat16"
    assert imported.tensors.dtypes["model.layers.0.mlp.up_proj.weight"] == "gptq"
    found = weights.load(imported).params["layers"][1]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(found, params["layers"][1]["mlp"]["down"]["kernel"].dense())
    values = json.loads((tmp_path / "quantize_config.json").read_text())
    assert values == json.loads((tmp_path / "config.json").read_text())["quantization_config"]
