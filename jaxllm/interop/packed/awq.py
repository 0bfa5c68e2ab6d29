"""AWQ files of version GEMM (Lin et al. 2023, arXiv:2306.00978), as AutoAWQ writes them: 4 bits, with a zero for each group.

    qweight  int32 [I, O / 8]  codes, packed across the outputs
    qzeros   int32 [G, O / 8]  zeros, packed in the same way
    scales   float16 [G, O]

A word holds eight neighbouring outputs in the order `words.AWQ_ORDER`. Groups are runs of inputs.
"""

from typing import Any

import numpy as np

from jaxllm.interop import family
from jaxllm.interop.packed import words
from jaxllm.interop.packed.codes import Codes, Parts, index, runs, take, zeros
from jaxllm.interop.packed.settings import Settings

METHOD, MARKS = "awq", ("qweight",)
PARTS = ("qweight", "qzeros", "scales")
BITS = 4


def settings(given: family.Settings) -> Settings:
    """Of a quantization_config, or of the quant_config.json of older tools, which has other keys."""
    given.only("w_bit" if "w_bit" in given.values else "bits", BITS)
    version = str(given.get("version", given.get("format", "gemm"))).lower()
    if version != "gemm":
        raise given.refuse("version", version, "gemm")
    key = "q_group_size" if "q_group_size" in given.values else "group_size"
    group = 0 if given.get(key, 128) == -1 else given.size(key, 128)
    return Settings("awq", BITS, group, not given.flag("zero_point", True), ignore=tuple(given.get("modules_to_not_convert", ())))


def config(settings: Settings) -> dict[str, Any]:
    """The quantization_config. Zeros are stored, also of a symmetric grid."""
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": settings.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(settings.ignore),
    }


def beside(settings: Settings) -> dict[str, bytes]:
    """No further files."""
    del settings
    return {}


def shape(name: str, parts: Parts, settings: Settings) -> tuple[int, int]:
    """(O, I) of the Linear."""
    del settings
    inputs, columns = take(name, parts, "qweight", "i", (None, None)).shape
    return columns * 8, inputs


def read(name: str, parts: Parts, settings: Settings) -> Codes:
    """The Linear `name`; ValueError if its parts do not fit each other or the settings."""
    outputs, inputs = shape(name, parts, settings)
    group = settings.group or inputs
    count = -(-inputs // group)
    scale = take(name, parts, "scales", "f", (count, outputs))
    codes = words.natural_order(words.unpack(take(name, parts, "qweight", "i", (inputs, None)), BITS, 1, outputs))
    zero = None
    if not settings.symmetric or "qzeros" in parts:
        stored = take(name, parts, "qzeros", "i", (count, outputs // 8))
        zero = words.natural_order(words.unpack(stored, BITS, 1, outputs)).T
    if zero is not None and (zero == 2 ** (BITS - 1)).all():
        zero = None
    return Codes(codes.T, scale.T, zero, index(runs(inputs, group), count), BITS)


def layout(outputs: int, inputs: int, groups: int, settings: Settings) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every part that `write` gives."""
    del settings
    return {
        "qweight": ((inputs, outputs // 8), "int32"),
        "qzeros": ((groups, outputs // 8), "int32"),
        "scales": ((groups, outputs), "float16"),
    }


def write(codes: Codes, settings: Settings) -> dict[str, np.ndarray]:
    """The parts of a Linear."""
    del settings
    return {
        "qweight": words.pack(words.awq_order(codes.codes.T), BITS, 1),
        "qzeros": words.pack(words.awq_order(zeros(codes).T), BITS, 1),
        "scales": codes.scale.T,
    }
