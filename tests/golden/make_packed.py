"""Writes packed/expected.npz beside it: small Linear layers as the tools that made the formats of jaxllm/interop/packed store them.

    python tests/golden/make_packed.py AUTO_GPTQ AUTO_AWQ

needs torch, transformers, compressed-tensors and bitsandbytes, and the directories of the unpacked wheel of auto-gptq 0.7.1 and of the
unpacked sources of autoawq 0.2.9: of both, only modules that pack are loaded, as the packages no longer go with transformers.

CASE/NAME is a tensor of the file (a Linear called `x`, so x.qweight ...), CASE/dense the weight [O, I] that the tool itself makes of it, in
its dtype; `settings` is JSON: CASE -> quantization_config. packed/versions.json says what it was made with.
"""

import importlib
import json
import platform
import sys
import types
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import compressed_tensors
import numpy as np
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

HERE = Path(__file__).resolve().parent / "packed"
OUTPUTS, INPUTS = 32, 64


def bare(name: str, root: Path) -> None:
    """Makes the modules below the package `name` importable without what its own beginning imports."""
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")))]
    sys.modules[name] = package


def grid(bits: int, group: int, symmetric: bool, ordered: bool, seed: int) -> tuple[torch.Tensor, ...]:
    """(codes [O, I], scale [O, G] in float16, zero [O, G], groups [I])."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (OUTPUTS, INPUTS), generator=rng)
    scale = (0.01 + 0.02 * torch.rand(OUTPUTS, INPUTS // group, generator=rng)).half()
    zero = torch.randint(1, 2**bits, scale.shape, generator=rng)
    groups = torch.arange(INPUTS) // group
    if ordered:
        groups = groups[torch.randperm(INPUTS, generator=rng)]
    return codes, scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero, groups


def linear(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, groups: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.float32)
    layer.weight.data = (codes - zero[:, groups]) * scale.float()[:, groups]
    return layer


def gptq(root: Path) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    bare("auto_gptq", root), bare("auto_gptq.nn_modules", root), bare("auto_gptq.nn_modules.qlinear", root)
    module = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    found = {}
    for seed, (name, bits, group, symmetric, ordered) in enumerate(
        [
            ("gptq", 4, 32, True, False),
            ("gptq_zeros", 4, 16, False, True),
            ("gptq_8", 8, 64, True, False),
            ("gptq_2", 2, 32, False, False),
        ]
    ):
        codes, scale, zero, groups = grid(bits, group, symmetric, ordered, seed)
        layer = module.QuantLinear(bits, group, INPUTS, OUTPUTS, bias=False)
        layer.pack(linear(codes, scale, zero, groups), scale.float(), zero.float(), groups.int())
        layer.scales = layer.scales.half()
        tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered}
        found[name] = (config, tensors | {"dense": layer(torch.eye(INPUTS, dtype=torch.float16)).T})
    return found


def awq(root: Path) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        bare(name, root)
    module = importlib.import_module("awq.modules.linear.gemm")
    codes, scale, zero, groups = grid(4, 32, False, False, 9)
    zero[0, 0], zero[1, 1] = 0, 15
    layer = module.WQLinear_GEMM.from_linear(linear(codes, scale, zero, groups), 4, 32, scales=scale.T, zeros=zero.T)
    tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    dense = module.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).T
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return {"awq": (config, tensors | {"dense": dense})}


def whole_numbers() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """compressed-tensors."""
    token = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    cases = {
        "ct": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, torch.float32),
        "ct_zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, torch.float32),
        "ct_8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, torch.float16),
        "ct_one_scale": ("pack-quantized", {"num_bits": 8, "strategy": "tensor"}, torch.float32),
        "ct_int": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, torch.bfloat16),
    }
    found = {}
    for seed, (name, (format, fields, dtype)) in enumerate(cases.items()):
        args = QuantizationArgs(type="int", **fields)
        count = INPUTS // (args.group_size or INPUTS)
        codes, scale, zero, groups = grid(args.num_bits, INPUTS // count, args.symmetric, False, 20 + seed)
        scale = scale.to(dtype)
        scale = scale[:1, 0] if args.strategy == "tensor" else scale
        dense = (codes - zero[:, groups]) * (scale.float() if scale.ndim == 1 else scale.float()[:, groups])
        scheme = QuantizationScheme(
            targets=["Linear"], weights=args, input_activations=token if format == "int-quantized" else None
        )
        compressor = BaseCompressor.get_value_from_registry(format)
        # Theirs count from -2^(bits-1).
        offset = (zero - 2 ** (args.num_bits - 1)).to(torch.int8)
        state = {"weight": dense, "weight_scale": scale, "weight_zero_point": offset[:, 0] if scale.ndim == 1 else offset}
        if args.symmetric:
            del state["weight_zero_point"]
        tensors = compressor.compress(state, scheme)
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, quantization_status="compressed")
        found[name] = (
            json.loads(config.model_dump_json()),
            tensors | {"dense": compressor.decompress(tensors, scheme)["weight"]},
        )
    return found


def normal_floats() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """bitsandbytes."""
    found: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
    rng = torch.Generator().manual_seed(7)
    # The last one has blocks that go on in the next output, 270 of them.
    for name, kind, double, shape in [
        ("nf4", "nf4", False, (OUTPUTS, INPUTS)),
        ("nf4_double", "nf4", True, (180, 96)),
        ("fp4", "fp4", False, (OUTPUTS, INPUTS)),
    ]:
        weight = torch.randn(shape, generator=rng)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
        tensors = {"weight": packed} | {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double,
        }
        # Of the last one, dequantize_4bit gives other numbers on a CPU: its kernel there takes a block to end where an output ends.
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
        dense = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, 64, shape, torch.float32)
        found[name] = (config, tensors | {"dense": dense})
    codes, largest, _ = bnb.int8_vectorwise_quant(torch.randn((OUTPUTS, INPUTS), generator=rng).half())
    dense = bnb.int8_vectorwise_dequant(codes, largest)
    found["int8"] = ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weight": codes, "SCB": largest, "dense": dense})
    return found


def array(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 goes as float32, which holds it exactly."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().contiguous().numpy()


def main() -> None:
    HERE.mkdir(exist_ok=True)
    cases = gptq(Path(sys.argv[1])) | awq(Path(sys.argv[2])) | whole_numbers() | normal_floats()
    arrays = {f"{case}/{name}": array(tensor) for case, (_, tensors) in cases.items() for name, tensor in tensors.items()}
    arrays["settings"] = np.array(json.dumps({case: config for case, (config, _) in cases.items()}))
    np.savez_compressed(HERE / "expected.npz", **arrays)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "auto-gptq": "0.7.1",
        "autoawq": "0.2.9",
        "compressed-tensors": compressed_tensors.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
