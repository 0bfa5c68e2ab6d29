"""compressed-tensors and bitsandbytes, in transformers, load what is written, and what they write is read. Part of `make parity`."""

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file

from jaxllm.interop import directory, weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "interop"))

from foreign_models import MODELS, make  # noqa: E402
from quantized_models import quantized, sizes  # noqa: E402
from test_exports import ours, theirs  # noqa: E402

LOGITS = 2e-4
# Their remarks on tied embeddings, on Conv1D and on deprecations of their own.
pytestmark = pytest.mark.filterwarnings("ignore")
DEQUANTIZE = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def write(path: Path, case: str, packing: str, kind: str, **grid: Any) -> tuple[Any, Any]:
    """(model, parameters) of what is written."""
    _, model, params = quantized(MODELS[case][1], kind, **grid)
    # Padding that is no id of the batch: a classifier of GPT-2 or LLaMA looks for a row's last token that is none.
    carried = {"config.json": b'{"pad_token_id": 39}'} if "classes" in case else {}
    directory.write(path, params, model.config, None, carried, packing=packing)
    return model, params


@pytest.mark.parametrize(
    ("case", "packing", "grid", "options"),
    [
        ("llama", "pack-quantized", {}, {}),
        ("llama tied", "pack-quantized", {"bits": 8, "group": 64}, {}),
        ("qwen2", "pack-quantized", {"group": 0}, {}),
        ("llama tied", "pack-quantized", {"bits": 3}, {}),
        ("llama", "pack-quantized", {"bits": 3, "symmetric": False}, DEQUANTIZE),
        ("llama", "pack-quantized", {"bits": 2, "group": 64}, {}),
        ("bert classes", "pack-quantized", {}, {}),
        ("llama classes", "pack-quantized", {"bits": 8, "group": 0}, {}),
        ("mistral", "pack-quantized", {"symmetric": False}, DEQUANTIZE),
        ("t5", "pack-quantized", {}, DEQUANTIZE),
    ],
)
def test_transformers_loads_pack_quantized(case: str, packing: str, grid: dict[str, Any], options: Any, tmp_path: Path) -> None:
    model, params = write(tmp_path, case, packing, "grid", **grid)
    loaded, info = getattr(transformers, MODELS[case][0]).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info.values()), info
    np.testing.assert_allclose(theirs(loaded), ours(model, params), atol=LOGITS)
    # The weights themselves, without a difference.
    tensors, state = directory.read(tmp_path).tensors, loaded.state_dict()
    names = [name for name, kind in tensors.dtypes.items() if kind == packing]
    assert len(names) >= 12
    for name in names:
        np.testing.assert_array_equal(state[name], tensors.read(name), err_msg=name)


def test_transformers_loads_int_quantized(tmp_path: Path) -> None:
    """With and without its rounding of activations."""
    model, params = write(tmp_path, "llama", "int-quantized", "int8")
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    rounded = theirs(loaded)
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    expected = ours(model, params)
    np.testing.assert_allclose(theirs(loaded), expected, atol=LOGITS)
    # It does round them: to 1/127 of the largest, where a logit is a sum over layers.
    assert 1e-3 < np.abs(rounded - expected).max() < 0.1 * np.abs(expected).max()


SCHEMES: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "pack-quantized zeros": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "pack-quantized 3": {"num_bits": 3, "strategy": "group", "group_size": 32},
    "pack-quantized 8": {"num_bits": 8, "strategy": "channel"},
    "int-quantized": {"num_bits": 8, "strategy": "channel"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_their_own_compressor_is_read(scheme: str, tmp_path: Path) -> None:
    """A model that compressed-tensors quantizes and transformers saves."""
    _, model, params = make(MODELS["llama"][1], **sizes(MODELS["llama"][1]))
    directory.write(tmp_path / "dense", params, model.config, None, {})
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    format = scheme.split()[0]
    token = {"num_bits": 8, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": SCHEMES[scheme],
        "input_activations": token if format == "int-quantized" else None,
    }
    config = QuantizationConfig(config_groups={"group_0": group}, format=format, quantization_status="frozen", ignore=["lm_head"])
    apply_quantization_config(loaded, config)
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):
            args = module.quantization_scheme.weights
            runs = module.weight.data.reshape(len(module.weight), -1, args.group_size or module.weight.shape[1])
            scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), args)
            module.weight_scale.data = scale
            module.weight_zero_point.data = zero
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(loaded)
    loaded.save_pretrained(tmp_path / "packed")
    compressor.update_config(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert any(name.endswith("weight_packed") for name in stored) == (format == "pack-quantized")
    compressor.decompress_model(loaded)
    expected = {name: x.numpy() for name, x in loaded.state_dict().items() if name.endswith(".weight")}
    imported = directory.read(tmp_path / "packed")
    assert set(imported.tensors.shapes) == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(imported.tensors.read(name), weight, err_msg=name)
    weights.load(imported)


@pytest.mark.parametrize(("packing", "kind"), [("pack-quantized", "grid"), ("nf4", "nf4")])
def test_what_is_not_quantized_is_named(packing: str, kind: str, tmp_path: Path) -> None:
    """Attention is dense, and so are the tied head and the table."""
    _, model, params = quantized(MODELS["llama tied"][1], kind)
    for layer in params["layers"]:
        for each in layer["attention"].values():
            if "kernel" in each:
                each["kernel"] = each["kernel"].dense()
    directory.write(tmp_path, params, model.config, None, {}, packing=packing)
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert not hasattr(loaded.model.layers[0].self_attn.q_proj, "quantization_scheme")
    # bitsandbytes multiplies in bfloat16 on a CPU.
    np.testing.assert_allclose(theirs(loaded.dequantize() if kind == "nf4" else loaded), ours(model, params), atol=LOGITS)


@pytest.mark.parametrize(("case", "kind"), [("llama", "nf4"), ("llama tied", "double"), ("gpt2", "double"), ("bert", "nf4")])
def test_bitsandbytes_loads_nf4(case: str, kind: str, tmp_path: Path) -> None:
    """The weights without a difference. Its product on a CPU is in bfloat16, so logits are compared after it has made them dense."""
    model, params = write(tmp_path, case, "nf4", kind)
    loaded, info = getattr(transformers, MODELS[case][0]).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    tensors, layers = directory.read(tmp_path).tensors, 0
    for name, module in loaded.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            layers += 1
            dense = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).numpy()
            mine = tensors.read(f"{name}.weight")
            np.testing.assert_array_equal(dense, mine.T if case == "gpt2" else mine, err_msg=name)
    assert layers >= 8
    np.testing.assert_allclose(theirs(loaded.dequantize()), ours(model, params), atol=LOGITS)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"bnb_4bit_use_double_quant": True}, {"bnb_4bit_quant_type": "fp4"}, {}])
def test_what_bitsandbytes_saves_is_read(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    _, model, params = make(MODELS[case][1], **sizes(MODELS[case][1]))
    directory.write(tmp_path / "dense", params, model.config, None, {})
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4"} | options)
    loaded = getattr(transformers, MODELS[case][0]).from_pretrained(tmp_path / "dense", quantization_config=config)
    loaded.save_pretrained(tmp_path / "packed")
    imported = directory.read(tmp_path / "packed")
    for name, module in loaded.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            dense = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy()
            mine = imported.tensors.read(f"{name}.weight")
            np.testing.assert_array_equal(dense, mine.T if case == "gpt2" else mine, err_msg=name)
    weights.load(imported)


def test_compressed_tensors_converts_awq(tmp_path: Path) -> None:
    """What it takes the files for is what they are."""
    write(tmp_path, "llama", "awq", "grid", symmetric=False)
    tensors, stored = directory.read(tmp_path).tensors, load_file(tmp_path / "model.safetensors")
    converter = AutoAWQConverter(group_size=32)
    names = [name for name in stored if name.endswith(".qweight")]
    assert len(names) == 14
    for name in names:
        linear = name.removesuffix(".qweight")
        codes, scale, zero = converter._convert_gemm_module(stored[name], stored[f"{linear}.scales"], stored[f"{linear}.qzeros"])
        dense = (codes.float() - zero.float().repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
        np.testing.assert_array_equal(dense, tensors.read(f"{linear}.weight"))
