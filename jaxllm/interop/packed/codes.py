"""A quantized Linear as NumPy arrays, in the order of its dense weight in PyTorch: O outputs, I inputs, G groups of inputs."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# What a file holds of one Linear, by the names behind that of the Linear: "qweight", "weight_scale", ...
Parts = Mapping[str, np.ndarray]


class Codes(NamedTuple):
    """(code - zero) x scale.

    codes: uint8 [O, I], below 2^bits. scale: [O, G], float32, bfloat16 or float16. zero: uint8 [O, G], or None for 2^(bits-1).
    groups: int32 [I], the group of each input, or None for runs of I / G inputs.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    groups: np.ndarray | None
    bits: int

    def dense(self) -> np.ndarray:
        """float32 [O, I]."""
        outputs, inputs = self.codes.shape
        # [O, G, inputs of a group] where groups are runs, so that nothing is spread; else [O, I, 1].
        shape = (outputs, self.scale.shape[1], -1) if self.groups is None else (outputs, inputs, 1)
        steps = self.codes.reshape(shape).astype(np.float32)
        steps -= np.float32(2 ** (self.bits - 1)) if self.zero is None else self._of_groups(self.zero)
        steps *= self._of_groups(self.scale)
        return steps.reshape(outputs, inputs)

    def _of_groups(self, x: np.ndarray) -> np.ndarray:
        """What groups share, as it goes with `dense`."""
        wide = x.astype(np.float32)
        return (wide if self.groups is None else wide[:, self.groups])[:, :, None]


class Nested(NamedTuple):
    """Scales of double quantization: table[code] x absmax of its run of `block` scales + offset.

    table: float32 [256]. absmax: float32 [scales / block, rounded up]. offset: the mean of the scales.
    """

    table: np.ndarray
    absmax: np.ndarray
    offset: float
    block: int = 256


class NormalFloat(NamedTuple):
    """table[code] x absmax of its block; a block is a run of `block` weights in row-major order, also across rows.

    codes: uint8 [O, I], below 16. table: float32 [16]. absmax: [blocks], float32, or uint8 codes that `nested` tells the meaning of.
    """

    codes: np.ndarray
    table: np.ndarray
    absmax: np.ndarray
    block: int
    nested: Nested | None = None

    def dense(self) -> np.ndarray:
        """float32 [O, I]."""
        values = self.table[self.codes].reshape(-1)
        return (values * np.repeat(self.scale(), self.block)[: values.size]).reshape(self.codes.shape)

    def scale(self) -> np.ndarray:
        """float32 [blocks]."""
        if self.nested is None:
            return self.absmax
        table, absmax, offset, block = self.nested
        return table[self.absmax] * np.repeat(absmax, block)[: self.absmax.size] + np.float32(offset)


def zeros(codes: Codes) -> np.ndarray:
    """uint8 [O, G], also where all are the middle code."""
    return np.full(codes.scale.shape, 2 ** (codes.bits - 1), np.uint8) if codes.zero is None else codes.zero


def runs(inputs: int, group: int) -> np.ndarray:
    """int32 [inputs]: the group of each, where groups are runs of `group`."""
    return np.arange(inputs, dtype=np.int32) // group


def index(groups: np.ndarray, count: int) -> np.ndarray | None:
    """The groups of inputs as `Codes` has them: None where they are equal runs, `count` of them."""
    inputs = len(groups)
    plain = inputs % count == 0 and np.array_equal(groups, runs(inputs, inputs // count))
    return None if plain else np.asarray(groups, np.int32)


def take(name: str, parts: Parts, part: str, kind: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """One part of the Linear `name`; ValueError if it is not there, or not of this shape (None: any length) and `kind`.

    kind: "i" for int32 and such, "f" for floats, "u" for uint8; several for any of them.
    """
    found = parts.get(part)
    # Floats that NumPy has no name for, such as bfloat16, are of the kind "V".
    if found is not None and ("f" if found.dtype.kind == "V" else found.dtype.kind) in kind and len(found.shape) == len(shape):
        lengths = zip(found.shape, shape, strict=True)
        if all(wanted is None or length == wanted for length, wanted in lengths):
            return found
    what = "is not there" if found is None else f"is {found.dtype.name} {list(found.shape)}"
    wanted = [length if length is not None else "any" for length in shape]
    kinds = " or ".join({"i": "whole numbers", "u": "bytes", "f": "floats"}[letter] for letter in kind)
    raise ValueError(
        f"{name}.{part} {what}.\n  Accepted: {kinds} of shape {wanted}, by quantization_config and the parts beside it.\n"
        "  Fetch config and tensors of the same model, or correct quantization_config."
    )
