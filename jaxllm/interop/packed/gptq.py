"""GPTQ files (Frantar et al. 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write them.

    qweight  int32 [I x bits / 32, O]  codes, packed down the inputs
    qzeros   int32 [G, O x bits / 32]  zeros, packed across the outputs; the first version of the format ("gptq") has 1 less, "gptq_v2" not
    scales   float16 [G, O]
    g_idx    int32 [I]                 the group of each input

The 1 is taken off whole words, as GPTQModel does: where a zero is 0, the next one in its word gives it the bit that it borrows.
"""

import json
from typing import Any

import numpy as np

from jaxllm.interop import family
from jaxllm.interop.packed import words
from jaxllm.interop.packed.codes import Codes, Parts, index, runs, take, zeros
from jaxllm.interop.packed.settings import Settings

METHOD, MARKS = "gptq", ("qweight",)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# Layouts of 3 bits differ between the tools.
BITS = (2, 4, 8)


def settings(given: family.Settings) -> Settings:
    """Of a quantization_config, or of the quantize_config.json of older tools, which have the same keys."""
    given.only("is_marlin_format", False)
    bits = given.get("bits", 4)
    if bits not in BITS:
        raise given.refuse("bits", bits, ", ".join(map(str, BITS)))
    group = given.get("group_size", 128)
    if group != -1:
        group = given.size("group_size", 128)
    named = str(given.get("checkpoint_format", given.get("format", "gptq"))).lower()
    if named not in ("gptq", "gptq_v2"):
        raise given.refuse("checkpoint_format", named, "gptq, gptq_v2")
    # Keys are patterns of names; those that begin with "-" name what is not quantized.
    for pattern, changed in given.section("dynamic").values.items():
        if changed and not pattern.startswith("-"):
            raise given.refuse("dynamic", {pattern: changed}, "one way for all layers that are quantized")
    return Settings(named, bits, max(group, 0), given.flag("sym", True), given.flag("desc_act", False))


def config(settings: Settings) -> dict[str, Any]:
    """The quantization_config."""
    return {
        "quant_method": METHOD,
        "bits": settings.bits,
        "group_size": settings.group or -1,
        "desc_act": settings.ordered,
        "sym": settings.symmetric,
        "checkpoint_format": settings.format,
        "lm_head": False,
        "true_sequential": True,
    }


def beside(settings: Settings) -> dict[str, bytes]:
    """quantize_config.json, which older tools read."""
    return {"quantize_config.json": (json.dumps(config(settings), indent=2) + "\n").encode()}


def shape(name: str, parts: Parts, settings: Settings) -> tuple[int, int]:
    """(O, I) of the Linear."""
    rows, outputs = take(name, parts, "qweight", "i", (None, None)).shape
    return outputs, rows * words.WORD_BITS // settings.bits


def read(name: str, parts: Parts, settings: Settings) -> Codes:
    """The Linear `name`; ValueError if its parts do not fit each other or the settings."""
    outputs, inputs = shape(name, parts, settings)
    bits = settings.bits
    count = -(-inputs // (settings.group or inputs))
    scale = take(name, parts, "scales", "f", (count, outputs))
    codes = words.unpack(take(name, parts, "qweight", "i", (None, outputs)), bits, 0, inputs)
    zero = _zero(take(name, parts, "qzeros", "i", (count, words.count(outputs, bits))), outputs, settings)
    groups = runs(inputs, settings.group or inputs)
    if "g_idx" in parts:
        given = take(name, parts, "g_idx", "i", (inputs,))
        if given.min() < 0 or given.max() >= count:
            raise ValueError(
                f"{name}.g_idx names groups from {given.min()} to {given.max()}.\n  Accepted: 0 to {count - 1}, by scales.\n"
                "  Fetch the files again."
            )
        # Some tools leave it empty where groups are runs.
        groups = given if given.any() else groups
    return Codes(codes.T, scale.T, None if zero is None else zero.T, index(groups, count), bits)


def _ones(bits: int) -> np.ndarray:
    """A word of codes of 1."""
    return words.pack(np.ones(words.WORD_BITS // bits, np.uint8), bits, 0)


def _zero(packed: np.ndarray, outputs: int, settings: Settings) -> np.ndarray | None:
    """uint8 [G, O], or None if all are the middle code.

    Of a symmetric grid the zero is known, and what is stored says which version it is: files that say "gptq" hold zeros of the other one.
    """
    bits, middle = settings.bits, 2 ** (settings.bits - 1)
    stored = words.unpack(packed, bits, 1, outputs)
    if settings.symmetric and ((stored == middle - 1).all() or (stored == middle).all()):
        return None
    if settings.format == "gptq":
        stored = words.unpack(packed + _ones(bits), bits, 1, outputs)
    return None if (stored == middle).all() else stored


def layout(outputs: int, inputs: int, groups: int, settings: Settings) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every part that `write` gives."""
    return {
        "qweight": ((words.count(inputs, settings.bits), outputs), "int32"),
        "qzeros": ((groups, words.count(outputs, settings.bits)), "int32"),
        "scales": ((groups, outputs), "float16"),
        "g_idx": ((inputs,), "int32"),
    }


def write(codes: Codes, settings: Settings) -> dict[str, np.ndarray]:
    """The parts of a Linear."""
    outputs, inputs = codes.codes.shape
    count = codes.scale.shape[1]
    packed = words.pack(zeros(codes).T, codes.bits, 1)
    return {
        "qweight": words.pack(codes.codes.T, codes.bits, 0),
        "qzeros": packed - _ones(codes.bits) if settings.format == "gptq" else packed,
        "scales": codes.scale.T,
        "g_idx": runs(inputs, inputs // count) if codes.groups is None else codes.groups,
    }
