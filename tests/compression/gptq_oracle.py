"""GPTQ in NumPy, float64, as the paper has it (Frantar et al. 2022, arXiv:2210.17323, equations 2 and 3): one input at a time, H^-1 itself
with the rounded input eliminated, no factor and no blocks."""

from typing import NamedTuple

import numpy as np


class Codes(NamedTuple):
    codes: np.ndarray
    dense: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def scales(part: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).astype(np.float32).astype(np.float64)
    zero = np.full(scale.shape, 2.0 ** (bits - 1)) if symmetric else np.rint(-low / np.where(scale > 0, scale, 1))
    return scale, np.clip(zero, 0, 2**bits - 1)


def solve(kernel: np.ndarray, hessian: np.ndarray, bits: int, group: int, symmetric: bool, damp: float, order: str) -> Codes:
    """order: none, static, group."""
    kernel, hessian = kernel.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    inputs, outputs = kernel.shape
    group = group or inputs
    dead = np.diag(hessian) <= 0
    kernel[dead] = 0
    hessian[dead, dead] = 1
    sequence = np.arange(inputs) if order == "none" else np.argsort(-np.where(dead, 0, np.diag(hessian)), kind="stable")
    fixed = [scales(kernel[start : start + group], bits, symmetric) for start in range(0, inputs, group)]
    inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(inputs))
    codes, dense = np.zeros((inputs, outputs)), np.zeros((inputs, outputs))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for place, index in enumerate(sequence):
        if order == "static":
            scale, zero = fixed[index // group]
        elif place % group == 0:
            found.append(scales(kernel[sequence[place : place + group]], bits, symmetric))
            scale, zero = found[-1]
        steps = kernel[index] / np.where(scale > 0, scale, 1) * (1 + 2.0**-20 * symmetric)
        codes[index] = np.clip(np.rint(steps) + zero, 0, 2**bits - 1)
        dense[index] = (codes[index] - zero) * scale
        # Equation 2, and equation 3: H^-1 without the row and the column of this input.
        error = (kernel[index] - dense[index]) / inverse[index, index]
        rest = sequence[place + 1 :]
        kernel[rest] -= inverse[rest, index][:, None] * error
        inverse -= np.outer(inverse[:, index], inverse[index]) / inverse[index, index]
    chosen = fixed if order == "static" else found
    return Codes(codes, dense, np.stack([scale for scale, _ in chosen]), np.stack([zero for _, zero in chosen]))
