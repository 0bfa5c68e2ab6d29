"""Quantized kernels of a parameter tree as the codes of a Linear, and back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.interop.packed.codes import Codes, Nested, NormalFloat, runs, zeros
from jaxllm.transforms import nf4, quantized
from jaxllm.transforms.affine import Affine
from jaxllm.transforms.int8 import Int8
from jaxllm.transforms.nf4 import Nf4
from jaxllm.transforms.quantized import Quantized


class Form(NamedTuple):
    """How a kernel is quantized. normal: nf4. groups: of inputs, of each output. double: the scales are quantized, too."""

    normal: bool
    bits: int
    groups: int
    symmetric: bool = True
    ordered: bool = False
    double: bool = False


def form(leaf: Quantized, inputs: int) -> Form:
    """Of the kernel of one layer, whose first `inputs` axes are summed over."""
    if isinstance(leaf, Nf4):
        return Form(True, 4, math.prod(leaf.absmax.shape[:inputs]), double=leaf.nested is not None)
    if isinstance(leaf, Int8):
        return Form(False, 8, 1)
    assert isinstance(leaf, Affine), f"no form of {type(leaf).__name__}"
    return Form(False, leaf.bits, math.prod(leaf.scale.shape[:inputs]), leaf.zero is None, leaf.groups is not None)


def read(parts: Sequence[Quantized], inputs: int) -> Codes | NormalFloat:
    """The codes of one Linear, whose outputs are those of these kernels of one layer, side by side. inputs: axes that are summed over.

    ValueError if their groups differ.
    """
    if all(isinstance(part, Nf4) for part in parts):
        return _normal_float([part for part in parts if isinstance(part, Nf4)], inputs)
    every = [_affine(part, inputs) for part in parts]
    first = every[0]
    for codes in every[1:]:
        same = (codes.groups is None) == (first.groups is None) and np.array_equal(codes.groups, first.groups)  # type: ignore[arg-type]
        if (codes.bits, codes.scale.shape[1]) != (first.bits, first.scale.shape[1]) or not same:
            raise ValueError(
                "kernels that share a tensor, such as q, k and v of GPT-2, have codes of other bits or other groups of inputs.\n"
                "  Accepted: the same ones.\n  Quantize them alike, from the same statistics."
            )
    zero = None
    if any(part.zero is not None for part in every):
        zero = np.concatenate([zeros(part) for part in every])
    joined = first._replace(
        codes=np.concatenate([part.codes for part in every]), scale=np.concatenate([part.scale for part in every])
    )
    return joined._replace(zero=zero)


def _matrix(x: jax.Array, inputs: int) -> np.ndarray:
    """[inputs..., outputs...] as [O, I]."""
    host = np.asarray(x)
    return host.reshape(math.prod(host.shape[:inputs]), -1).T


def _affine(leaf: Quantized, inputs: int) -> Codes:
    if isinstance(leaf, Int8):
        codes = (_matrix(leaf.codes, inputs).astype(np.int16) + 128).astype(np.uint8)
        return Codes(codes, _matrix(leaf.scale, inputs), None, None, 8)
    assert isinstance(leaf, Affine), f"no codes of {type(leaf).__name__}"
    codes = _matrix(quantized.unpack(leaf.codes, leaf.axis, leaf.bits), inputs)
    zero = None if leaf.zero is None else _matrix(leaf.zero, inputs)
    groups = None if leaf.groups is None else np.asarray(leaf.groups).reshape(-1)
    return Codes(codes, _matrix(leaf.scale, inputs), zero, groups, leaf.bits)


def _normal_float(parts: Sequence[Nf4], inputs: int) -> NormalFloat:
    codes = np.concatenate([_matrix(quantized.unpack(part.codes, part.axis, 4, high_first=True), inputs) for part in parts])
    if len(parts) > 1 or parts[0].nested is None:
        # Runs of 256 scales end elsewhere in the joined kernel: its scales are stored as the numbers that they stand for.
        absmax = np.concatenate([_matrix(part.scale(), inputs).reshape(-1) for part in parts])
        return NormalFloat(codes, nf4.TABLE, absmax, nf4.BLOCK)
    (part,) = parts
    nested = Nested(nf4.DYNAMIC, np.asarray(part.nested), float(part.offset), nf4.SCALES)
    return NormalFloat(codes, nf4.TABLE, _matrix(part.absmax, inputs).reshape(-1), nf4.BLOCK, nested)


def make(name: str, codes: Codes | NormalFloat, like: Any, shape: tuple[int, ...], part: tuple[int, int]) -> Quantized:
    """The kernel of one layer, of this `shape`, with arrays on the host; its codes are those of the Linear `name`.

    like: the same with the shapes and types of its arrays. part: (index, count) where outputs of other kernels are beside its own.
    ValueError if the codes have zeros or an index of groups, and the kernel has no place for them.
    """
    index, count = part
    width = len(codes.codes) // count
    mine = slice(index * width, (index + 1) * width)
    dense = jnp.asarray(codes.codes[mine].T.reshape(shape))
    if isinstance(codes, NormalFloat):
        return jax.device_get(_make_normal_float(codes, dense, like, mine))
    scale = codes.scale[mine].T.reshape(like.scale.shape).astype(like.scale.dtype)
    zero, groups = getattr(like, "zero", None), getattr(like, "groups", None)
    if (codes.zero is not None and zero is None) or (codes.groups is not None and groups is None):
        what = "zeros" if codes.zero is not None and zero is None else "an index of groups"
        raise ValueError(
            f"{name} has {what}, which quantization_config says there are not.\n  Accepted: tensors and config of one model.\n"
            "  Correct sym or desc_act in quantization_config, or fetch the files again."
        )
    if isinstance(like, Int8):
        return dataclasses.replace(like, codes=(np.asarray(dense).astype(np.int16) - 128).astype(np.int8), scale=scale)
    if zero is not None:
        zero = zeros(codes)[mine].T.reshape(zero.shape)
    if groups is not None:
        inputs, number = codes.codes.shape[1], codes.scale.shape[1]
        groups = (runs(inputs, inputs // number) if codes.groups is None else codes.groups).reshape(groups.shape)
    packed = quantized.pack(dense, like.axis, like.bits)
    return jax.device_get(dataclasses.replace(like, codes=packed, scale=scale, zero=zero, groups=groups))


def _make_normal_float(codes: NormalFloat, dense: jax.Array, like: Any, mine: slice) -> Nf4:
    packed = quantized.pack(dense, like.axis, 4, high_first=True)
    nested, offset, absmax = None, None, codes.absmax
    if like.nested is None:
        absmax = codes.scale()
    elif codes.nested is not None:
        nested, offset = codes.nested.absmax, np.float32(codes.nested.offset)
    absmax = absmax.reshape(len(codes.codes), -1)[mine].T.reshape(like.absmax.shape)
    return dataclasses.replace(like, codes=packed, absmax=absmax, nested=nested, offset=offset)
