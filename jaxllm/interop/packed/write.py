"""The tensors of a model some of whose kernels are quantized, as a format has them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.interop.family import Family
from jaxllm.interop.packed import formats, leaves, limits
from jaxllm.interop.packed.codes import Codes, NormalFloat
from jaxllm.interop.packed.settings import Settings
from jaxllm.interop.weights import Exported
from jaxllm.transforms.quantized import Quantized


class Packed(NamedTuple):
    """shapes, dtypes: of every tensor by its name, in order. make(name) -> the tensor. config: the quantization_config.

    files: name -> bytes of what lies beside. notes: lines for the user.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    make: Callable[[str], np.ndarray]
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def pack(exported: Exported, family: Family, kind: str, dtype: str, forced: bool) -> Packed:
    """Every quantized kernel in the format `kind`, the other tensors in `dtype`; heads and tables stay dense.

    ValueError if nothing is quantized, if kernels are quantized in ways that the format has no place for, and, unless forced, if no
    other tool would load it.
    """
    forms = {name: found for name in exported.shapes if (found := _forms(exported, name))}
    sizes = {name: _size(exported, name, found[0].groups) for name, found in forms.items()}
    settings = _settings(forms, sizes, kind)._replace(ignore=_ignored(exported, family, forms), dtype=dtype)
    limits.check(settings, sizes, family.name, forced)
    format = formats.WRITTEN[kind]
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    owners: dict[str, tuple[str, str]] = {}
    for name, shape in exported.shapes.items():
        if name not in forms:
            shapes[name], dtypes[name] = shape, dtype
            continue
        linear, size = name.removesuffix(".weight"), sizes[name]
        # See leaves.read.
        own = settings._replace(double=settings.double and len(forms[name]) == 1)
        for part, (part_shape, part_dtype) in format.layout(size.outputs, size.inputs, size.groups, own).items():
            shapes[f"{linear}.{part}"], dtypes[f"{linear}.{part}"] = part_shape, part_dtype
            owners[f"{linear}.{part}"] = (name, part)
    last: dict[str, Mapping[str, np.ndarray]] = {}

    def make(tensor: str) -> np.ndarray:
        if tensor not in owners:
            return exported.make(tensor)
        name, part = owners[tensor]
        if name not in last:
            # The parts of one Linear follow each other.
            last.clear()
            last[name] = format.write(_codes(exported, name, settings, forced), settings)
        return last[name][part]

    return Packed(
        shapes, dtypes, make, format.config(settings), format.beside(settings), limits.notes(settings, sizes, family.name)
    )


def _forms(exported: Exported, name: str) -> list[leaves.Form]:
    """Of the kernels that a tensor is made of, if all are quantized and it is the weight of a Linear inside the model."""
    rule, parts = exported.rules[name], exported.pieces(name)
    if not rule.inputs or not name.endswith(".weight") or not all(isinstance(part, Quantized) for part in parts):
        return []
    return [leaves.form(part, rule.inputs) for part in parts]


def _size(exported: Exported, name: str, groups: int) -> limits.Size:
    rule = exported.rules[name]
    outputs, inputs = exported.shapes[name] if rule.transposed else exported.shapes[name][::-1]
    return limits.Size(outputs, inputs, groups, rule.path.split("/")[-2] in ("o", "down"))


def _settings(forms: Mapping[str, Sequence[leaves.Form]], sizes: Mapping[str, limits.Size], kind: str) -> Settings:
    """What all kernels have in common; ValueError if that is not enough for one quantization_config."""
    every = [form for parts in forms.values() for form in parts]
    wants, has = kind == "nf4", {form.normal for form in every}
    if has != {wants}:
        what = "no kernel is quantized" if not has else "some kernels are nf4" if True in has else "no kernel is nf4"
        accepted = "nf4 kernels" if wants else "kernels in whole numbers: int8, int4, gptq, awq"
        raise ValueError(
            f"{what}, and files of {kind} are to be written.\n  Accepted: {accepted}.\n  Take another format, or quantize so."
        )
    bits = {form.bits for form in every}
    inputs = {sizes[name].inputs // form.groups for name, parts in forms.items() for form in parts}
    groups = {0} if all(form.groups == 1 for form in every) else inputs
    if len(bits) > 1 or len(groups) > 1:
        raise ValueError(
            f"kernels have codes of {' and '.join(map(str, sorted(bits)))} bits in groups of {' and '.join(map(str, sorted(groups)))}"
            " inputs.\n  Accepted: one way for all.\n  Quantize them alike, or leave some out of quant.targets."
        )
    (group,) = groups
    ordered = bool(group) and any(form.ordered for form in every)
    return Settings(kind, bits.pop(), group, all(form.symmetric for form in every), ordered, any(form.double for form in every))


def _ignored(exported: Exported, family: Family, forms: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the layers that are not quantized, the head among them, also where it is the table of tokens."""
    dense = [name for name, rule in exported.rules.items() if name not in forms and (rule.inputs or rule.path == "head/kernel")]
    heads = [name for name in family.copies if "embed" not in name and name.endswith(".weight")]
    return tuple(dict.fromkeys(name.removesuffix(".weight") for name in (*dense, *heads)))


def _codes(exported: Exported, name: str, settings: Settings, forced: bool) -> Codes | NormalFloat:
    """The codes of a Linear; ValueError, unless forced, for scales that the file would change."""
    codes = leaves.read(exported.pieces(name), exported.rules[name].inputs)
    if isinstance(codes, NormalFloat):
        return codes
    dtype = "float16" if settings.format in ("gptq", "gptq_v2", "awq") else settings.dtype
    exact = codes.scale.astype(np.float32)
    if not forced and dtype != "float32":
        stored = exact.astype(formats.FLOATS[dtype]).astype(np.float32)
        if not np.array_equal(stored, exact):
            raise ValueError(
                f"the scales of {name} are no {dtype} numbers, as which {settings.format} files hold them.\n"
                f"  Accepted: scales that are rounded already: quant.scale_dtype = '{dtype}'.\n"
                "  Quantize again with it, or write another dtype; or force it, which rounds them and changes the model."
            )
    return codes if settings.ordered else codes._replace(groups=None)
