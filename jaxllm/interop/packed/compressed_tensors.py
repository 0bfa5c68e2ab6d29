"""Files of compressed-tensors: weights in whole numbers.

    weight_packed      int32 [O, I x bits / 32]  "pack-quantized": codes, packed along the inputs
    weight_shape       int64 [2]                 O and I
    weight             int8 [O, I]               "int-quantized": codes - 128
    weight_scale       float [O, G]; [O, 1] and [1] are a scale of all inputs, and of all weights
    weight_zero_point  int32 [O x bits / 32, G]  zeros, packed down the outputs, where the grid is not symmetric; int8 [O, G] of
                       zeros - 2^(bits-1) in "int-quantized" and in older files
    weight_g_idx       int32 [I]                 the group of each input, where groups are no runs

Codes are whole numbers from -2^(bits-1) with 2^(bits-1) added, which are the codes of a grid here.
"""

from typing import Any

import numpy as np

from jaxllm.interop import family
from jaxllm.interop.packed import words
from jaxllm.interop.packed.codes import Codes, Parts, index, runs, take, zeros
from jaxllm.interop.packed.settings import Settings

METHOD, MARKS = "compressed-tensors", ("weight_scale",)
# The last ones are of activations, which stay as they are here.
PARTS = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
PACKED, WHOLE = "pack-quantized", "int-quantized"
FORMATS = {PACKED: PACKED, WHOLE: WHOLE, "naive-quantized": WHOLE}
# Of 3 bits, the layout since compressed-tensors 0.20, where no bit is left out; before, a word had ten of them.
BITS = (2, 3, 4, 8)


# Of activations: each token by itself.
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def settings(given: family.Settings) -> Settings:
    """Of a quantization_config. ValueError for groups of layers that are quantized in different ways."""
    given.only("quantization_status", "compressed")
    given.only("kv_cache_scheme", None)
    given.only("transform_config", {})
    given.section("sparsity_config").only("format", "dense")
    groups = given.section("config_groups")
    found: dict[Settings, str] = {}
    for name in groups.values:
        group = groups.section(name)
        kind = group.choice("format", FORMATS, given.get("format", PACKED))
        settings = _of_weights(group.section("weights"), kind, tuple(given.get("ignore", ())))
        activations = group.get("input_activations", None)
        rounds = kind == WHOLE and isinstance(activations, dict) and TOKEN.items() <= activations.items()
        found[settings._replace(rounds=rounds)] = name
        if activations and not rounds:
            given.notes.append(
                "other tools that read it round activations, too, in a way that is not known here: here they are not"
            )
    if len(found) != 1:
        raise given.refuse("config_groups", dict(groups.values), "one way for all layers that are quantized")
    return next(iter(found))


def _of_weights(given: family.Settings, kind: str, ignore: tuple[str, ...]) -> Settings:
    given.only("type", "int")
    bits = given.get("num_bits", 8)
    if bits not in BITS or (kind == WHOLE and bits != 8):
        raise given.refuse("num_bits", bits, ", ".join(map(str, BITS)) if kind == PACKED else f"8 of {WHOLE}")
    size = given.get("group_size", -1)
    strategy = given.get("strategy", "group" if size > 0 else "channel")
    if strategy not in ("group", "channel", "tensor"):
        raise given.refuse("strategy", strategy, "group, channel, tensor")
    group = given.size("group_size", 128) if strategy == "group" else 0
    ordered = given.get("actorder", None) in ("group", "dynamic", True)
    return Settings(kind, bits, group, given.flag("symmetric", True), ordered, ignore=ignore)


def config(settings: Settings) -> dict[str, Any]:
    """The quantization_config. In "int-quantized" the readers round activations, each token by itself."""
    weights = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "group" if settings.group else "channel",
        "group_size": settings.group or None,
        "dynamic": False,
        **({"actorder": "group"} if settings.ordered else {}),
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": TOKEN if settings.format == WHOLE else None}
    return {
        "quant_method": METHOD,
        "format": settings.format,
        "quantization_status": "compressed",
        "ignore": list(settings.ignore),
        "config_groups": {"group_0": {**group, "output_activations": None}},
    }


def beside(settings: Settings) -> dict[str, bytes]:
    """No further files."""
    del settings
    return {}


def shape(name: str, parts: Parts, settings: Settings) -> tuple[int, int]:
    """(O, I) of the Linear."""
    del settings
    if "weight_packed" not in parts:
        outputs, inputs = take(name, parts, "weight", "i", (None, None)).shape
        return outputs, inputs
    outputs, inputs = map(int, take(name, parts, "weight_shape", "i", (2,)))
    return outputs, inputs


def read(name: str, parts: Parts, settings: Settings) -> Codes:
    """The Linear `name`; ValueError if its parts do not fit each other or the settings."""
    outputs, inputs = shape(name, parts, settings)
    bits = settings.bits
    group = settings.group or inputs
    count = -(-inputs // group)
    scale = parts["weight_scale"]
    scale = np.broadcast_to(scale, (outputs, 1)) if scale.size == 1 else take(name, parts, "weight_scale", "f", (outputs, count))
    if "weight_packed" in parts:
        packed = take(name, parts, "weight_packed", "i", (outputs, words.count(inputs, bits)))
        codes = words.unpack(packed, bits, 1, inputs)
    else:
        codes = _from_signed(take(name, parts, "weight", "i", (outputs, inputs)), bits)
    zero = None if settings.symmetric else _zero(name, parts, outputs, scale.shape[1], bits)
    groups = take(name, parts, "weight_g_idx", "i", (inputs,)) if "weight_g_idx" in parts else runs(inputs, group)
    return Codes(codes, scale, zero, index(groups, scale.shape[1]), bits)


def _zero(name: str, parts: Parts, outputs: int, count: int, bits: int) -> np.ndarray:
    found = parts.get("weight_zero_point")
    if found is not None and found.dtype == np.int8:
        return _from_signed(np.broadcast_to(found, (outputs, count)), bits)
    packed = take(name, parts, "weight_zero_point", "i", (words.count(outputs, bits), count))
    return words.unpack(packed, bits, 0, outputs)


def _from_signed(x: np.ndarray, bits: int) -> np.ndarray:
    return (x.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def _to_signed(x: np.ndarray, bits: int) -> np.ndarray:
    return (x.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def layout(outputs: int, inputs: int, groups: int, settings: Settings) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every part that `write` gives."""
    bits, scale = settings.bits, {"weight_scale": ((outputs, groups), settings.dtype)}
    if settings.format == WHOLE:
        return {"weight": ((outputs, inputs), "int8"), **scale}
    parts = {"weight_packed": ((outputs, words.count(inputs, bits)), "int32"), **scale, "weight_shape": ((2,), "int64")}
    if not settings.symmetric:
        parts["weight_zero_point"] = ((words.count(outputs, bits), groups), "int32")
    if settings.ordered:
        parts["weight_g_idx"] = ((inputs,), "int32")
    return parts


def write(codes: Codes, settings: Settings) -> dict[str, np.ndarray]:
    """The parts of a Linear."""
    outputs, inputs = codes.codes.shape
    if settings.format == WHOLE:
        return {"weight": _to_signed(codes.codes, codes.bits), "weight_scale": codes.scale}
    parts = {
        "weight_packed": words.pack(codes.codes, codes.bits, 1),
        "weight_scale": codes.scale,
        "weight_shape": np.array([outputs, inputs], np.int64),
    }
    if not settings.symmetric:
        parts["weight_zero_point"] = words.pack(zeros(codes), codes.bits, 0)
    if settings.ordered:
        count = codes.scale.shape[1]
        parts["weight_g_idx"] = runs(inputs, inputs // count) if codes.groups is None else codes.groups
    return parts
