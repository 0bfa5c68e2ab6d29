"""Writes nf4/expected.npz beside it: what bitsandbytes makes of small weights on a CPU.

    python tests/golden/make_nf4.py

needs torch and bitsandbytes, which the test that reads the file does not. CASE/weight is [out, in]; with double quantization
CASE/packed, /absmax (codes), /nested, /offset, /scale (absmax as it is read again) and /dense; without it CASE/single_absmax and
/single_dense. table and dynamic are the numbers that codes stand for. nf4/versions.json says what it was made with.
"""

import json
import platform
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch

HERE = Path(__file__).resolve().parent / "nf4"


def weights() -> dict[str, np.ndarray]:
    """All [out, in] in float32, `in` a multiple of 64."""
    rng = np.random.default_rng(0)
    random = rng.normal(scale=0.05, size=(24, 128))
    # 320 scales: one whole nested block, and a part of one.
    long = rng.normal(size=(40, 512)) * np.exp(rng.normal(size=(40, 1)))
    zeros = random.copy()
    zeros[0, :64] = 0
    zeros[5] = 0
    outliers = random.copy()
    outliers[rng.random(random.shape) < 0.01] *= 100
    equal = np.where(rng.random((6, 128)) < 0.5, 0.25, -0.125)  # all scales are their mean
    every = {"random": random, "long": long, "zeros": zeros, "outliers": outliers, "equal": equal, "nothing": np.zeros((4, 64))}
    return {name: weight.astype(np.float32) for name, weight in every.items()} | {"ties": ties()}


def ties() -> np.ndarray:
    """Middles between two numbers of the table and their next neighbours, times largest weights of either sign, also odd ones."""
    table = bnb.get_4bit_type("nf4", device="cpu").numpy()
    middles = (table[:-1] + table[1:]) / np.float32(2)
    near = np.concatenate([middles, np.nextafter(middles, np.float32(-2)), np.nextafter(middles, np.float32(2)), table, [0, -0.0]])
    row = np.concatenate([near[:63], [1]]).astype(np.float32)
    return np.stack([row * np.float32(largest) for largest in (1, -1, 2**-7, -(2.0**5), 0.3, -0.7, 3, 1.1)])


def expected(weight: np.ndarray) -> dict[str, np.ndarray]:
    packed, state = bnb.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=True)
    again, single = bnb.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    assert torch.equal(packed, again)
    scale = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    found = {
        "packed": packed,
        "absmax": state.absmax,
        "nested": state.state2.absmax,
        "offset": state.offset,
        "scale": scale,
        "dense": bnb.dequantize_4bit(packed, state),
        "single_absmax": single.absmax,
        "single_dense": bnb.dequantize_4bit(packed, single),
    }
    return {"weight": weight} | {name: tensor.numpy() for name, tensor in found.items()}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    arrays = {f"{case}/{name}": array for case, weight in weights().items() for name, array in expected(weight).items()}
    arrays["table"] = bnb.get_4bit_type("nf4", device="cpu").numpy()
    arrays["dynamic"] = bnb.create_dynamic_map().numpy()
    np.savez_compressed(HERE / "expected.npz", **arrays)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
