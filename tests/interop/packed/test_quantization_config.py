"""What quantization_config says: read as other tools write it, written, and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import MODELS, llama_tensors, write_llama
from quantized_models import quantized
from safetensors.numpy import load_file, save_file

from jaxllm.interop import directory, family, weights
from jaxllm.interop.packed import awq, formats, gptq
from jaxllm.interop.packed.codes import Codes
from jaxllm.interop.packed.settings import Settings
from jaxllm.transforms import leaf

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
CT_GROUP = {"targets": ["Linear"], "weights": CT_WEIGHTS, "input_activations": None}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": CT_GROUP},
    "ignore": ["lm_head"],
}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def identify(values: dict[str, Any], path: Path) -> formats.Found:
    found = formats.identify(path, family.Settings({"quantization_config": values}, "config.json"))
    assert found is not None
    return found


def ct(**changes: Any) -> dict[str, Any]:
    """One group whose weights are changed."""
    return CT | {"config_groups": {"group_0": CT_GROUP | {"weights": CT_WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GPTQ, Settings("gptq", 4, 128)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1, "bits": 8}, Settings("gptq_v2", 8)),
        (GPTQ | {"format": "gptq_v2", "desc_act": True, "sym": False}, Settings("gptq_v2", 4, 128, False, True)),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, Settings("gptq", 4, 128)),
        (
            {"quant_method": "awq", "version": "GEMM", "group_size": 64, "modules_to_not_convert": ["lm_head"]},
            Settings("awq", 4, 64, False, ignore=("lm_head",)),
        ),
        (CT, Settings("pack-quantized", 4, 128, ignore=("lm_head",))),
        (ct(strategy="channel", group_size=None, symmetric=False), Settings("pack-quantized", 4, 0, False, ignore=("lm_head",))),
        (ct(actorder="group", num_bits=8), Settings("pack-quantized", 8, 128, ordered=True, ignore=("lm_head",))),
        (ct(actorder="static"), Settings("pack-quantized", 4, 128, ignore=("lm_head",))),
        (
            ct(strategy="tensor", group_size=None, num_bits=8) | {"format": "int-quantized"},
            Settings("int-quantized", 8, ignore=("lm_head",)),
        ),
        (BNB | {"bnb_4bit_use_double_quant": True}, Settings("nf4", 4, double=True)),
        ({"_load_in_4bit": True, "load_in_4bit": True}, Settings("fp4", 4)),
        (BNB | {"load_in_4bit": False, "load_in_8bit": True}, Settings("llm_int8", 8)),
    ],
)
def test_read(values: dict[str, Any], expected: Settings, tmp_path: Path) -> None:
    assert identify(values, tmp_path).settings == expected


@pytest.mark.parametrize(
    "settings",
    [
        Settings("gptq", 8, 64, True, True),
        Settings("gptq_v2", 4, 0, False),
        Settings("awq", 4, 32, False, ignore=("lm_head", "score")),
        Settings("pack-quantized", 4, 128, False, ignore=("lm_head",)),
        Settings("pack-quantized", 4, 64, True, True),
        Settings("int-quantized", 8, rounds=True, ignore=("lm_head",)),
        Settings("nf4", 4, double=True, ignore=("lm_head",)),
    ],
)
def test_written_is_read_again(settings: Settings, tmp_path: Path) -> None:
    values = json.loads(json.dumps(formats.WRITTEN[settings.format].config(settings)))
    assert identify(values, tmp_path).settings == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": 4}, r"quant_method = None.\n  Accepted: compressed-tensors, gptq, awq, bitsandbytes"),
        ({"quant_method": "hqq"}, r"quant_method = 'hqq'"),
        (GPTQ | {"bits": 3}, r"bits = 3.\n  Accepted: 2, 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format = 'marlin'"),
        (GPTQ | {"group_size": 0}, r"group_size = 0"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic = .*\n  Accepted: one way for all layers"),
        ({"quant_method": "awq", "version": "gemv"}, r"version = 'gemv'.\n  Accepted: gemm"),
        ({"quant_method": "awq", "bits": 8}, r"bits = 8"),
        (CT | {"format": "float-quantized"}, r"format = 'float-quantized'.\n  Accepted: pack-quantized, int-quantized"),
        (CT | {"quantization_status": "frozen"}, r"quantization_status = 'frozen'"),
        (CT | {"transform_config": {"config_groups": {"u": {}}}}, r"transform_config = "),
        (CT | {"config_groups": {"a": CT_GROUP, "b": ct(num_bits=8)["config_groups"]["group_0"]}}, r"Accepted: one way for all"),
        (ct(num_bits=5), r"num_bits = 5.\n  Accepted: 2, 3, 4, 8"),
        (ct(type="float"), r"type = 'float'"),
        (ct(strategy="block"), r"strategy = 'block'"),
        ({"quant_method": "bitsandbytes"}, r"load_in_4bit = False"),
    ],
)
def test_refused(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        identify(values, tmp_path)


def test_older_files_of_their_own(tmp_path: Path) -> None:
    """quantize_config.json of AutoGPTQ, quant_config.json of AutoAWQ; the one in config.json comes first."""
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": True, "sym": True}))
    found = formats.identify(tmp_path, family.Settings({}, "config.json"))
    assert found == (gptq, Settings("gptq", 4, 32, ordered=True))
    assert identify(BNB, tmp_path).settings.format == "nf4"
    (tmp_path / "quantize_config.json").unlink()
    (tmp_path / "quant_config.json").write_text(json.dumps({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}))
    found = formats.identify(tmp_path, family.Settings({}, "config.json"))
    assert found == (awq, Settings("awq", 4, 64, False))
    (tmp_path / "quant_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"quant_config.json' holds no JSON object.\n  Accepted"):
        formats.identify(tmp_path, family.Settings({}, "config.json"))


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """A copy whose tensors of these names, with "/" for ".", are others; None takes one out."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors: dict[str, Any] = load_file(source / "model.safetensors") | {name.replace("/", "."): x for name, x in changes.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, target / "model.safetensors")
    return target


def test_what_files_hold_besides(tmp_path: Path) -> None:
    """Biases of zeros, as AutoGPTQ writes them for layers that have none; an index that is left empty; a head that is quantized, too."""
    _, model, params = quantized(MODELS["llama"][1], "grid")
    directory.write(tmp_path / "one", params, model.config, None, {}, packing="gptq")
    name = "model.layers.0.self_attn.q_proj"
    plain = weights.load(directory.read(tmp_path / "one"))
    head = np.asarray(plain.params["head"]["kernel"])
    # A head whose weights are codes already.
    codes = np.random.default_rng(0).integers(0, 16, head.shape).astype(np.uint8)
    packed = Codes(codes, np.full((len(codes), 2), 0.5, np.float16), None, None, 4)
    parts = {f"lm_head/{part}": x for part, x in gptq.write(packed, Settings("gptq", 4, 32)).items()}
    changes: dict[str, Any] = {f"{name}.bias": np.zeros(128, np.float16), f"{name}.g_idx": np.zeros(64, np.int32)}
    path = rewritten(tmp_path / "one", tmp_path / "two", **changes, **parts, **{"lm_head/weight": None})
    loaded = weights.load(directory.read(path))
    assert loaded.unused == (f"{name}.bias",)
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], (codes.astype(np.float32) - 8) / 2)
    kernel = leaf.dense(params["layers"][0]["attention"]["q"]["kernel"])
    np.testing.assert_array_equal(loaded.params["layers"][0]["attention"]["q"]["kernel"], kernel)
    one = rewritten(tmp_path / "one", tmp_path / "three", **{f"{name}.bias": np.ones(128, np.float16)})
    with pytest.raises(ValueError, match=rf"unexpected \(1\): {name}.bias"):
        weights.load(directory.read(one))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("qzeros", None, r"q_proj.qzeros is not there.\n  Accepted: whole numbers of shape \[2, 16\]"),
        ("scales", np.ones((4, 128), np.float16), r"q_proj.scales is float16 \[4, 128\].\n  Accepted: floats of shape \[2, 128\]"),
        ("g_idx", np.full(64, 2, np.int32), r"q_proj.g_idx names groups from 2 to 2.\n  Accepted: 0 to 1"),
        ("qweight", np.zeros((8, 64), np.int32), r"q_proj.scales is float16 \[2, 128\].\n  Accepted: floats of shape \[2, 64\]"),
    ],
)
def test_parts_that_do_not_fit(part: str, change: Any, words: str, tmp_path: Path) -> None:
    _, model, params = quantized(MODELS["llama"][1], "grid")
    directory.write(tmp_path / "one", params, model.config, None, {}, packing="gptq")
    name = "model.layers.0.self_attn.q_proj"
    imported = directory.read(rewritten(tmp_path / "one", tmp_path / "two", **{f"{name}.{part}": change}))
    with pytest.raises(ValueError, match=words):
        imported.tensors.read(f"{name}.weight")


def test_a_directory_in_which_nothing_is_quantized(tmp_path: Path) -> None:
    path = write_llama(tmp_path, llama_tensors(), quantization_config=GPTQ)
    with pytest.raises(ValueError, match=r"says gptq, and no tensor is named \*.qweight"):
        directory.read(path)
