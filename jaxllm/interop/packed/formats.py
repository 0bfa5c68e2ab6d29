"""The formats by name, and which of them a directory is in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxllm.interop import family, safetensors
from jaxllm.interop.packed import awq, bitsandbytes, compressed_tensors, gptq
from jaxllm.interop.packed.codes import Codes, NormalFloat, Parts
from jaxllm.interop.packed.settings import Settings

CONFIG = "quantization_config"
# Older tools keep it in a file of its own: name -> the method that it is of.
OLD = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class Format(Protocol):
    """One module of this package.

    METHOD: quant_method of the quantization_config. PARTS: names of all that is stored of a Linear; MARKS: those that no dense one has.
    """

    @property
    def METHOD(self) -> str: ...

    @property
    def MARKS(self) -> tuple[str, ...]: ...

    @property
    def PARTS(self) -> tuple[str, ...]: ...

    def settings(self, given: family.Settings, /) -> Settings:
        """What a quantization_config says; ValueError for what is not read here."""
        ...

    def config(self, settings: Settings, /) -> dict[str, Any]:
        """The quantization_config."""
        ...

    def beside(self, settings: Settings, /) -> Mapping[str, bytes]:
        """Name -> bytes of further files that say the same."""
        ...

    def shape(self, name: str, parts: Parts, settings: Settings, /) -> tuple[int, int]:
        """(O, I) of the Linear `name`."""
        ...

    def read(self, name: str, parts: Parts, settings: Settings, /) -> Codes | NormalFloat:
        """The Linear; ValueError if its parts do not fit each other or the settings."""
        ...

    def layout(self, outputs: int, inputs: int, groups: int, settings: Settings, /) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every part that `write` gives."""
        ...

    def write(self, codes: Any, settings: Settings, /) -> Mapping[str, np.ndarray]:
        """The parts of a Linear; floats are cast to the types in `layout` by whoever stores them."""
        ...


# Types of the scales, by name.
FLOATS = {dtype.name: dtype for dtype in safetensors.TYPES.values()}
METHODS: tuple[Format, ...] = (compressed_tensors, gptq, awq, bitsandbytes)
# Settings.format of what is written -> its module.
WRITTEN: dict[str, Format] = {
    compressed_tensors.PACKED: compressed_tensors,
    compressed_tensors.WHOLE: compressed_tensors,
    "gptq": gptq,
    "gptq_v2": gptq,
    "awq": awq,
    "nf4": bitsandbytes,
}


class Found(NamedTuple):
    """How a directory is quantized."""

    format: Format
    settings: Settings


def identify(directory: Path, given: family.Settings) -> Found | None:
    """How the directory with this config.json is quantized, None if it is not; ValueError for a way that is not read here."""
    section, method = given.section(CONFIG), None
    if not section.values:
        path = next((directory / name for name in OLD if (directory / name).is_file()), None)
        if path is None:
            return None
        section, method = family.Settings(_old(path), str(path), given.notes), OLD[path.name]
    # bitsandbytes once left it out.
    method = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(section.values) else method
    named = section.get("quant_method", method)
    for format in METHODS:
        if named == format.METHOD:
            return Found(format, format.settings(section))
    raise section.refuse("quant_method", named, ", ".join(format.METHOD for format in METHODS))


def _old(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' holds no JSON object.\n  Accepted: the file as it was published.\n  Fetch it again.")
    return values
