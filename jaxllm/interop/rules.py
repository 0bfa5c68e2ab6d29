"""How one parameter of ours and one tensor of theirs become each other: the lines that the name tables are made of.

Ours are kernels [inputs..., outputs...], theirs matrices [outputs, inputs] of PyTorch's Linear, or [inputs, outputs] of GPT-2's
Conv1D. Letters: D width, H heads, G key/value heads, K head width, F mlp width, V vocabulary.
"""

import math
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """path: our parameter, without layer indices. name: their tensor; {layer} stands for the index of the layer.

    inputs: how many leading axes of our kernel are summed over; 0: the tensor is ours as it is, or flat (a bias).
    transposed: theirs is [outputs, inputs]. part: (index, count) where theirs holds the outputs of several of ours side by side.
    """

    path: str
    name: str
    inputs: int = 0
    transposed: bool = False
    part: tuple[int, int] = (0, 1)


def same(path: str, name: str) -> Rule:
    """An embedding or a norm, which both store alike."""
    return Rule(path, name)


def linear(path: str, name: str, inputs: int = 1) -> Rule:
    """A kernel whose tensor is [outputs, inputs]."""
    return Rule(path, name, inputs, True)


def conv(path: str, name: str, inputs: int = 1, part: tuple[int, int] = (0, 1)) -> Rule:
    """A kernel whose tensor is [inputs, outputs]."""
    return Rule(path, name, inputs, False, part)


def bias(path: str, name: str, part: tuple[int, int] = (0, 1)) -> Rule:
    """A bias, which they store flat."""
    return Rule(path, name, 0, False, part)


def stored_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of their tensor for our parameter of this `shape` (of one layer)."""
    if not rule.inputs:
        flat = shape if "bias" not in rule.path.rpartition("/")[2] else (math.prod(shape),)
        return (*flat[:-1], flat[-1] * rule.part[1])
    rows, columns = math.prod(shape[: rule.inputs]), math.prod(shape[rule.inputs :]) * rule.part[1]
    return (columns, rows) if rule.transposed else (rows, columns)


def to_ours(rule: Rule, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our parameter of this `shape`, as a view of their tensor."""
    matrix = tensor.T if rule.transposed else tensor
    index, count = rule.part
    width = matrix.shape[-1] // count
    return matrix[..., index * width : (index + 1) * width].reshape(shape)


def to_theirs(rule: Rule, parts: list[np.ndarray]) -> np.ndarray:
    """Their tensor, from our parameters that it holds, in order."""
    stored = [part.reshape(stored_shape(rule._replace(transposed=False, part=(0, 1)), part.shape)) for part in parts]
    matrix = stored[0] if len(stored) == 1 else np.concatenate(stored, axis=-1)
    return matrix.T if rule.transposed else matrix
