"""Grids and GPTQ in NumPy, float64: the oracle of the tests beside it."""

from typing import NamedTuple

import numpy as np

from jaxllm.transforms.affine import Grid

SHARES = np.linspace(1, 0.5, 20, endpoint=False)


class Found(NamedTuple):
    """codes: [I, O]; scale, zero: [G, O]; dense: [I, O]; group: [I], that of each input."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    dense: np.ndarray
    group: np.ndarray


def correlated(inputs: int, outputs: int, tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(kernel, inputs x [N, I]) in float32: inputs of different sizes that hang together."""
    rng = np.random.default_rng(seed)
    mix = np.eye(inputs) + rng.normal(size=(inputs, inputs)) / inputs**0.5
    x = rng.normal(size=(tokens, inputs)) @ mix * np.exp(0.4 * rng.normal(size=inputs))
    return rng.normal(0, 0.05, (inputs, outputs)).astype(np.float32), x.astype(np.float32)


def second_moment(x: np.ndarray) -> np.ndarray:
    """Float32."""
    return (x.astype(np.float64).T @ x).astype(np.float32)


def output_error(difference: np.ndarray, x: np.ndarray) -> float:
    """Over tokens, not by way of a Hessian."""
    return float(np.square(x.astype(np.float64) @ difference).sum())


def scales(weights: np.ndarray, grid: Grid, share: np.ndarray | float = 1) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero) [O] of one group [g, O], of a share of its range."""
    if grid.symmetric:
        scale = share * np.abs(weights).max(0) / (grid.codes / 2 - 0.5)
        return scale.astype(grid.scale_dtype).astype(np.float64), np.full(scale.shape, grid.codes // 2)
    low, high = share * np.minimum(weights.min(0), 0), share * np.maximum(weights.max(0), 0)
    scale = ((high - low) / (grid.codes - 1)).astype(grid.scale_dtype).astype(np.float64)
    return scale, np.clip(np.rint(-low / np.where(scale > 0, scale, 1)), 0, grid.codes - 1)


def nearest(weights: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    steps = weights / np.where(scale > 0, scale, 1)
    # A symmetric grid's largest weight is in the middle of two codes, and its scale rounded: the outer one is meant.
    return np.clip(np.rint(steps * (1 + 1e-6 * grid.symmetric)) + zero, 0, grid.codes - 1)


def round_groups(kernel: np.ndarray, grid: Grid, share: np.ndarray | None = None) -> Found:
    """To the nearest code; share: [G, O]."""
    kernel = kernel.astype(np.float64)
    size = grid.group or len(kernel)
    parts = kernel.reshape(-1, size, kernel.shape[1])
    share = np.ones((len(parts), 1)) if share is None else share
    found = [scales(part, grid, each) for part, each in zip(parts, share, strict=True)]
    scale, zero = (np.stack(each) for each in zip(*found, strict=True))
    group = np.arange(len(kernel)) // size
    codes = nearest(kernel, scale[group], zero[group], grid)
    return Found(codes, scale, zero, (codes - zero[group]) * scale[group], group)


def fitted(weights: np.ndarray, cost: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero) [O] of one group [g, O], of the share of its range that leaves the least sum of cost [g] times squared difference."""
    errors = []
    for share in SHARES:
        scale, zero = scales(weights, grid, share)
        errors.append(cost @ (weights - (nearest(weights, scale, zero, grid) - zero) * scale) ** 2)
    return scales(weights, grid, SHARES[np.argmin(errors, 0)])


def costs(inverse: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """[I]: what a squared difference of each input adds to the error when those after it make up for it (eq. 2: 1 / [H^-1]_ii of what is
    left)."""
    inverse, found = inverse.copy(), np.zeros(len(inverse))
    for i in turns:
        found[i] = 1 / inverse[i, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return found


def solve(kernel: np.ndarray, hessian: np.ndarray, grid: Grid, damp: float, order: str) -> Found:
    """Frantar et al. 2022, arXiv:2210.17323: eq. 2 for every input, with H^-1 of what is left by eq. 3; no factor, no blocks."""
    kernel, hessian = kernel.astype(np.float64), hessian.astype(np.float64)
    inputs, size = len(kernel), grid.group or len(kernel)
    diagonal = np.diagonal(hessian).copy()
    live = diagonal > 0
    kernel[~live], hessian[~live, ~live] = 0, 1
    inverse = np.linalg.inv(hessian + damp * diagonal[live].mean() * np.eye(inputs))
    turns = np.arange(inputs) if order == "none" else np.argsort(-diagonal, kind="stable")
    group = np.arange(inputs) // size
    if order == "group":
        group[turns] = np.arange(inputs) // size
    cost = costs(inverse, turns)
    found = [fitted(kernel[rows], cost[rows], grid) for rows in np.arange(inputs).reshape(-1, size)]
    scale, zero = (np.stack(each) for each in zip(*found, strict=True))
    codes, dense = np.zeros_like(kernel), np.zeros_like(kernel)
    for turn, i in enumerate(turns):
        left, g = turns[turn + 1 :], group[i]
        if order != "static" and turn % size == 0:
            rows = turns[turn : turn + size]
            scale[g], zero[g] = fitted(kernel[rows], cost[rows], grid)
        codes[i] = nearest(kernel[i], scale[g], zero[g], grid)
        dense[i] = (codes[i] - zero[g]) * scale[g]
        kernel[left] -= np.outer(inverse[left, i], (kernel[i] - dense[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return Found(codes, scale, zero, dense, group)
