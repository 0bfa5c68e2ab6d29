"""Files of bitsandbytes: 4 bits that stand for numbers of a table (QLoRA: Dettmers et al. 2023, arXiv:2305.14314), and LLM.int8().

weight                               uint8 [O x I / 2, 1]  codes of the flat weight, the first in the high half of a byte
weight.absmax                        float32 [blocks], or uint8 with double quantization
weight.quant_map                     float32 [16]          the table
weight.quant_state.bitsandbytes__nf4 uint8                 JSON: shape, sizes of the blocks, mean of the scales
weight.nested_absmax                 float32 [blocks / 256, rounded up]
weight.nested_quant_map              float32 [256]

weight                               int8 [O, I]           of LLM.int8(), which is read
SCB                                  float32 [O]           the largest weight of each output
"""

import json
from typing import Any

import numpy as np

from jaxllm.interop import family
from jaxllm.interop.packed.codes import Codes, Nested, NormalFloat, Parts, take
from jaxllm.interop.packed.settings import Settings

METHOD, MARKS = "bitsandbytes", ("weight.absmax", "SCB")
STATE = "weight.quant_state.bitsandbytes__"
PARTS = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(STATE + "nf4", STATE + "fp4", "SCB", "weight_format"),
)
# Bytes of the JSON, which spaces fill up: so its length is known before the numbers in it are.
STATE_BYTES = 256


def settings(given: family.Settings) -> Settings:
    """Of a quantization_config."""
    skipped = tuple(given.get("llm_int8_skip_modules", ()))
    if given.flag("load_in_8bit", given.flag("_load_in_8bit", False)):
        return Settings("llm_int8", 8, ignore=skipped)
    if not given.flag("load_in_4bit", given.flag("_load_in_4bit", False)):
        raise given.refuse("load_in_4bit", False, "true, or load_in_8bit true")
    kind = given.choice("bnb_4bit_quant_type", {"nf4": "nf4", "fp4": "fp4"}, "fp4")
    return Settings(kind, 4, double=given.flag("bnb_4bit_use_double_quant", False), ignore=skipped)


def config(settings: Settings) -> dict[str, Any]:
    """The quantization_config."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": settings.double,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": settings.dtype,
        "llm_int8_skip_modules": list(settings.ignore),
    }


def beside(settings: Settings) -> dict[str, bytes]:
    """No further files."""
    del settings
    return {}


def _state(name: str, parts: Parts) -> dict[str, Any]:
    """The JSON of the Linear `name`; ValueError if it is none, or lacks the shape."""
    found = next((part for part in parts if part.startswith(STATE)), f"{STATE}nf4")
    text = take(name, parts, found, "u", (None,)).tobytes()
    try:
        state = json.loads(text)
        outputs, inputs = map(int, state["shape"])
        return {**state, "shape": (outputs, inputs), "blocksize": int(state["blocksize"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}.{found} cannot be read: {type(error).__name__}: {error}.\n"
            "  Accepted: JSON with shape [outputs, inputs] and blocksize.\n  Fetch the files again."
        ) from error


def shape(name: str, parts: Parts, settings: Settings) -> tuple[int, int]:
    """(O, I) of the Linear."""
    if settings.format == "llm_int8":
        outputs, inputs = take(name, parts, "weight", "i", (None, None)).shape
        return outputs, inputs
    return _state(name, parts)["shape"]


def read(name: str, parts: Parts, settings: Settings) -> Codes | NormalFloat:
    """The Linear `name`; ValueError if its parts do not fit each other or the settings."""
    if settings.format == "llm_int8":
        weight = take(name, parts, "weight", "i", (None, None))
        largest = take(name, parts, "SCB", "f", (len(weight),))
        return Codes((weight.astype(np.int16) + 128).astype(np.uint8), largest[:, None] / np.float32(127), None, None, 8)
    state = _state(name, parts)
    (outputs, inputs), block = state["shape"], state["blocksize"]
    size = outputs * inputs
    # The bytes may be stored as numbers of another type.
    packed = np.ascontiguousarray(parts["weight"]).reshape(-1).view(np.uint8)
    if packed.size != -(-size // 2):
        raise ValueError(
            f"{name}.weight has {packed.size} bytes.\n  Accepted: {-(-size // 2)}, by the shape {[outputs, inputs]} in its state.\n"
            "  Fetch the files again."
        )
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:size].reshape(outputs, inputs)
    table = take(name, parts, "weight.quant_map", "f", (16,))
    blocks = -(-size // block)
    if "weight.nested_absmax" not in parts:
        return NormalFloat(codes, table, take(name, parts, "weight.absmax", "f", (blocks,)), block)
    nested_block = int(state["nested_blocksize"])
    nested = Nested(
        take(name, parts, "weight.nested_quant_map", "f", (256,)),
        take(name, parts, "weight.nested_absmax", "f", (-(-blocks // nested_block),)),
        float(state["nested_offset"]),
        nested_block,
    )
    return NormalFloat(codes, table, take(name, parts, "weight.absmax", "u", (blocks,)), block, nested)


def layout(outputs: int, inputs: int, groups: int, settings: Settings) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every part that `write` gives; groups: blocks of each output."""
    blocks = outputs * groups
    parts: dict[str, tuple[tuple[int, ...], str]] = {
        "weight": ((outputs * inputs // 2, 1), "uint8"),
        "weight.absmax": ((blocks,), "uint8" if settings.double else "float32"),
        "weight.quant_map": ((16,), "float32"),
        f"{STATE}nf4": ((STATE_BYTES,), "uint8"),
    }
    if settings.double:
        parts |= {"weight.nested_absmax": ((-(-blocks // 256),), "float32"), "weight.nested_quant_map": ((256,), "float32")}
    return parts


def write(codes: NormalFloat, settings: Settings) -> dict[str, np.ndarray]:
    """The parts of a Linear."""
    flat = codes.codes.reshape(-1)
    state = {"quant_type": "nf4", "blocksize": codes.block, "dtype": settings.dtype, "shape": list(codes.codes.shape)}
    parts = {
        "weight": (flat[::2] << 4 | flat[1::2])[:, None],
        "weight.absmax": codes.absmax,
        "weight.quant_map": codes.table,
    }
    if codes.nested is not None:
        table, absmax, offset, block = codes.nested
        state |= {"nested_blocksize": block, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"weight.nested_absmax": absmax, "weight.nested_quant_map": table}
    text = json.dumps(state).encode()
    return parts | {f"{STATE}nf4": np.frombuffer(text.ljust(STATE_BYTES), np.uint8)}
