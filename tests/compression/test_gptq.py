"""GPTQ beside NumPy in float64, and what it is for: a smaller error of the outputs than that of the nearest codes."""

from typing import Any

import gptq_oracle
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compression import gptq, grid
from jaxllm.transforms.affine import Grid

ORDERS = pytest.mark.parametrize("order", gptq.ORDERS)


def problem(inputs: int = 96, outputs: int = 40, tokens: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A kernel, and the sum of x x^T of inputs that hang together and differ in size, as those of a model do."""
    rng = np.random.default_rng(seed)
    x_NI = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.4 * rng.normal(size=(inputs, inputs)) / inputs**0.5)
    x_NI *= np.exp(rng.normal(0, 1, inputs)) / 5
    x_NI[:, 5] = 0
    return rng.normal(0, 0.05, (inputs, outputs)).astype(np.float32), (x_NI.T @ x_NI).astype(np.float32)


def error(kernel: Any, dense: Any, hessian: np.ndarray) -> float:
    off = np.asarray(kernel, np.float64) - np.asarray(dense, np.float64)
    return float(np.trace(off.T @ hessian.astype(np.float64) @ off))


@ORDERS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group", "inputs"), [(4, 32, 96), (3, 0, 96), (8, 96, 96), (2, 256, 512), (4, 0, 200)])
def test_codes_are_those_of_the_paper(order: str, symmetric: bool, bits: int, group: int, inputs: int) -> None:
    """Of thousands of weights some lie in the middle of two codes, and what follows on them differs."""
    kernel, hessian = problem(inputs)
    given = Grid(bits, group, symmetric, ordered=order == "group")
    solved = gptq.solve(kernel, hessian, given, damp=0.01, order=order)
    expected = gptq_oracle.solve(kernel, hessian, bits, group, symmetric, 0.01, order)
    found = solved.rounded
    assert found.codes.dtype == "uint8" and (found.zero is None) == symmetric and (found.groups is None) == (order != "group")
    differ = np.asarray(found.codes) != expected.codes
    assert differ.mean() < 0.02 and np.median(differ.mean(0)) == 0
    # Whole outputs are equal, scales and all.
    same = ~differ.any(0)
    assert same.mean() > 0.6
    np.testing.assert_allclose(found.scale[:, same], expected.scale[:, same], rtol=1e-4)
    np.testing.assert_allclose(np.asarray(found.dense(given))[:, same], expected.dense[:, same], rtol=2e-4, atol=1e-6)
    live = np.arange(inputs) != 5
    np.testing.assert_allclose(
        error(kernel[live], found.dense(given)[live], hessian[live][:, live]),
        error(kernel[live], expected.dense[live], hessian[live][:, live]),
        rtol=0.02,
    )
    assert float(solved.damp) == pytest.approx(0.01)


@ORDERS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(0, True), (32, False)])
def test_outputs_are_closer_than_those_of_the_nearest_codes(order: str, bits: int, group: int, symmetric: bool) -> None:
    kernel, hessian = problem(seed=bits)
    given = Grid(bits, group, symmetric, ordered=order == "group", scale_dtype="float16")
    mine = gptq.solve(kernel, hessian, given, order=order).rounded.dense(given)
    nearest = grid.round_to_nearest(kernel, given).dense(given)
    # In 2 bits and small groups, without an order, the paper's equations in float64 leave 0.93 to 1.04 of it over eight seeds, here 0.97.
    share = (0.99 if bits == 2 and group else 0.9) if order == "none" else 0.75
    assert error(kernel, mine, hessian) < share * error(kernel, nearest, hessian)
    assert error(kernel, mine, np.eye(96)) > error(kernel, nearest, np.eye(96))


@ORDERS
def test_inputs_that_have_nothing_to_do_with_each_other(order: str) -> None:
    """Nothing can make up for an error: each weight goes to the nearest code."""
    kernel, given = problem()[0], Grid(4, 32, ordered=order == "group")
    mine = gptq.solve(kernel, np.eye(96, dtype=np.float32) * 3, given, order=order).rounded
    nearest = grid.round_to_nearest(kernel, given)
    np.testing.assert_array_equal(mine.codes, nearest.codes)
    np.testing.assert_allclose(mine.dense(given), nearest.dense(given), rtol=1e-6)


@pytest.mark.parametrize("damp", [0.0, 1e-9])
def test_too_few_tokens_raise_the_damping(damp: float) -> None:
    """Of 20 tokens and 96 inputs H has no inverse; without any damping it gets some, and the result is finite and good."""
    kernel, hessian = problem(tokens=20)
    solved = gptq.solve(kernel, hessian, Grid(3, 0), damp=damp)
    assert 1e-9 < float(solved.damp) <= 1e-4
    dense = solved.rounded.dense(Grid(3, 0))
    assert np.isfinite(dense).all()
    nearest = grid.round_to_nearest(kernel, Grid(3, 0)).dense(Grid(3, 0))
    assert error(kernel, dense, hessian) < 0.1 * error(kernel, nearest, hessian)


def test_inputs_that_are_always_0_keep_no_weight() -> None:
    kernel, hessian = problem()
    hessian[40], hessian[:, 40] = 0, 0
    dense = np.asarray(gptq.solve(kernel, hessian, Grid(4, 32), order="none").rounded.dense(Grid(4, 32)))
    assert np.all(dense[[5, 40]] == 0) and np.abs(dense[41]).max() > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_the_best_of_its_steps(symmetric: bool) -> None:
    """In float64 over tokens, not over H: for each group and output the share that is best for the group's part of the output."""
    rng = np.random.default_rng(0)
    x_NI = rng.normal(size=(300, 64)) * np.exp(rng.normal(size=64))
    kernel = rng.standard_t(3, size=(64, 9)).astype(np.float32)
    given = Grid(3, 32, symmetric)
    found = grid.clipped(kernel, (x_NI.T @ x_NI).astype(np.float32), given)
    for start in (0, 32):
        part, x = kernel[start : start + 32], x_NI[:, start : start + 32]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        every = []
        for share in np.linspace(1, 0.5, 20, endpoint=False):
            tried = grid.with_limits(
                *(jnp.asarray(array, jnp.float32) for array in (part, low[None] * share, high[None] * share)), given
            )
            every.append(((x @ (part - np.asarray(tried.dense(given), np.float64))) ** 2).sum(0))
        mine = ((x @ (part - np.asarray(found.dense(given), np.float64)[start : start + 32])) ** 2).sum(0)
        np.testing.assert_allclose(mine, np.min(every, 0), rtol=1e-3)
        assert np.mean(np.argmin(every, 0) > 0) > 0.5
