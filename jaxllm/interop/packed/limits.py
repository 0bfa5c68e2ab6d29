"""What a format cannot hold, and what the tools that read it do not load: facts of vLLM, transformers 5.23 and compressed-tensors 0.20."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxllm.interop.packed.settings import Settings


class Size(NamedTuple):
    """Of a quantized Linear: outputs, inputs, groups of inputs. shared: its inputs are spread over devices by tensor parallelism."""

    outputs: int
    inputs: int
    groups: int
    shared: bool


class Limit(NamedTuple):
    """given: what is there. accepted: what would be. change: a way out."""

    given: str
    accepted: str
    change: str


def check(settings: Settings, sizes: Mapping[str, Size], family: str, forced: bool) -> None:
    """ValueError for what the format cannot hold, and, unless forced, for what its readers do not load.

    sizes: of every quantized Linear. family: the name of the Family.
    """
    for limit in _of_format(settings, sizes):
        raise ValueError(f"{settings.format} files cannot hold {limit.given}.\n  Accepted: {limit.accepted}.\n  {limit.change}.")
    for limit in () if forced else _of_readers(settings, sizes, family):
        raise ValueError(
            f"{limit.given} is not loaded from {settings.format} files by the tools that read them.\n"
            f"  Accepted: {limit.accepted}.\n  {limit.change}; or force it, for a reader of your own."
        )


def _of_format(settings: Settings, sizes: Mapping[str, Size]) -> Iterator[Limit]:
    """What has no place in the files."""
    kind, bits = settings.format, settings.bits
    accepted = {"awq": (4,), "int-quantized": (8,), "nf4": (4,), "pack-quantized": (2, 3, 4, 8)}.get(kind, (2, 4, 8))
    if bits not in accepted:
        yield Limit(f"codes of {bits} bits", ", ".join(map(str, accepted)), "Quantize to one of these, or write pack-quantized")
    if settings.ordered and kind in ("awq", "int-quantized"):
        yield Limit("groups that an index gives", "groups that are runs of inputs", "Quantize without quant.ordered, or write gptq")
    if kind == "int-quantized" and (settings.group or not settings.symmetric):
        yield Limit("groups of inputs or zeros", "a symmetric scale for each output", "Quantize so, or write pack-quantized")
    per_word = 32 // bits if kind in ("gptq", "gptq_v2", "awq") and bits in accepted else 1
    for name, size in sizes.items():
        if size.outputs % per_word or (kind != "awq" and size.inputs % per_word):
            yield Limit(
                f"{name}, whose {size.outputs} outputs or {size.inputs} inputs do not fill words of {per_word} codes",
                f"multiples of {per_word}",
                "Leave it out of quant.targets, or write pack-quantized",
            )


def _of_readers(settings: Settings, sizes: Mapping[str, Size], family: str) -> Iterator[Limit]:
    """What has a place, and no reader."""
    kind, bits = settings.format, settings.bits
    if kind in ("gptq", "gptq_v2") and bits not in (4, 8):
        yield Limit(f"a model in {bits} bits", "4, 8 (vLLM)", "Quantize to one of these")
    if kind in ("gptq", "gptq_v2") and not settings.symmetric:
        yield Limit("a grid with zeros", "a symmetric one (vLLM)", "Quantize with quant.symmetric, or write pack-quantized or awq")
    if kind == "pack-quantized" and settings.ordered:
        yield Limit(
            "an index of groups", "groups that are runs (compressed-tensors 0.20)", "Quantize without quant.ordered, or write gptq"
        )
    if kind in ("pack-quantized", "int-quantized") and family == "GPT-2":
        yield Limit("GPT-2, whose layers are Conv1D,", "models of Linear layers (transformers)", "Write gptq or nf4")
    if kind == "nf4" and family == "T5" and any(name.endswith(".wo.weight") for name in sizes):
        yield Limit("T5 with wo in nf4", "wo in float32 (transformers)", "Leave mlp/down/kernel out of quant.targets")


def notes(settings: Settings, sizes: Mapping[str, Size], family: str) -> tuple[str, ...]:
    """Lines for the user: what its readers must be told, and over how many devices they can share it out."""
    lines = []
    whole = settings.format in ("pack-quantized", "int-quantized")
    if whole and (family == "T5" or not settings.symmetric):
        what = "T5" if family == "T5" else "grids with zeros"
        lines.append(f"transformers reads {what} in this format with CompressedTensorsConfig(dequantize=True) alone")
    if settings.format == "pack-quantized" and settings.bits not in (4, 8):
        lines.append(f"codes of {settings.bits} bits: transformers with compressed-tensors 0.20 or newer reads them, vLLM does not")
    if settings.format == "int-quantized":
        lines.append("other tools round what these layers multiply to 8 bits, each token by itself")
    shared = [size for size in sizes.values() if size.shared and size.groups > 1]
    if settings.format != "nf4" and settings.group and shared:
        devices = [number for number in (2, 4, 8) if all(size.groups % number == 0 for size in shared)]
        fits = f"over {', '.join(map(str, devices))} devices" if devices else "over no number of devices"
        lines.append(f"groups of {settings.group} inputs: tensor parallelism can share the model out {fits}")
    return tuple(lines)
