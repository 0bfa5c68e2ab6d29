"""GPTQ beside the paper's equations in NumPy, float64, and what it promises: smaller errors of the outputs than the nearest codes."""

import gptq_paper as paper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.compression import gptq, grid
from jaxllm.transforms.affine import Grid

ORDERS = pytest.mark.parametrize("order", gptq.ORDERS)
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])


def compare(order: str, given: Grid, inputs: int, block: int, dead: tuple[int, ...] = ()) -> None:
    """Codes are the paper's, and the error of the outputs is smaller than that of the nearest codes. Where float32 decides between two
    codes, what follows on it may differ in that output."""
    kernel, x = paper.correlated(inputs, 64)
    x[:, list(dead)] = 0
    hessian = paper.second_moment(x)
    found, damp = gptq.solve(kernel, hessian, given, order=order, block=block)
    expected = paper.solve(kernel, hessian, given, 0.01, order)
    assert found.codes.dtype == jnp.uint8 and found.scale.dtype == given.scale_dtype and damp == np.float32(0.01)
    assert (found.zero is None) == given.symmetric and (found.groups is None) == (order != "group")
    off = np.abs(np.asarray(found.codes, np.float64) - expected.codes)
    assert (off > 0).mean() < 1e-3 and off.max() <= 1, f"{(off > 0).mean():.3%} differ, by up to {off.max()}"
    same = ~off.any(0)
    np.testing.assert_allclose(np.asarray(found.scale, np.float64)[:, same], expected.scale[:, same], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found.dense(given))[:, same], expected.dense[:, same], rtol=1e-5, atol=0)
    if found.groups is not None:
        np.testing.assert_array_equal(found.groups, expected.group)
    assert not np.asarray(found.dense(given))[list(dead)].any()
    nearest = paper.round_groups(kernel, given).dense
    assert paper.output_error(kernel - found.dense(given), x) < 0.8 * paper.output_error(kernel - nearest, x)


@ORDERS
@SYMMETRIC
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 0), (4, 16), (8, 48)])
def test_codes_are_those_of_the_paper(order: str, symmetric: bool, bits: int, group: int) -> None:
    """Groups larger and smaller than a block, and blocks that do not divide the inputs."""
    compare(order, Grid(bits, group, symmetric, ordered=order == "group"), inputs=96, block=20)


@ORDERS
def test_inputs_that_are_always_0_keep_no_weight(order: str) -> None:
    """Of a small Hessian, whose diagonal the 1 of such inputs would raise; scales in float16; a block that holds them all."""
    compare(order, Grid(4, 25, False, order == "group", "float16"), inputs=50, block=128, dead=(3, 4, 49))


@ORDERS
def test_inputs_without_anything_in_common(order: str) -> None:
    """None can make up for another, and the error of a group is its own: exactly the nearest codes of clipped ranges."""
    kernel, given = paper.correlated(96, 32)[0], Grid(3, 48, order == "none", order == "group")
    hessian = 7 * np.eye(96, dtype=np.float32)
    found, _ = gptq.solve(kernel, hessian, given, order=order, block=32)
    expected = grid.clipped(kernel, hessian, given)
    np.testing.assert_array_equal(found.codes, expected.codes)
    # Two programs may round the product of range and share otherwise.
    np.testing.assert_allclose(found.scale, expected.scale, rtol=2**-22)
    if expected.zero is not None:
        np.testing.assert_array_equal(found.zero, expected.zero)


@ORDERS
@pytest.mark.parametrize("group", [0, 32])
def test_long_tails_lose_less_than_by_clipping_alone(order: str, group: int) -> None:
    """With few codes, whole ranges of such weights would cost more than clipping them and making up for nothing."""
    kernel, x = paper.correlated(96, 64)
    kernel *= np.random.default_rng(1).standard_t(3, kernel.shape).astype(np.float32)
    given, hessian = Grid(3, group, ordered=order == "group"), paper.second_moment(x)
    found, clipped = gptq.solve(kernel, hessian, given, order=order)[0], grid.clipped(kernel, hessian, given)
    assert paper.output_error(kernel - found.dense(given), x) < 0.8 * paper.output_error(kernel - clipped.dense(given), x)


def test_damping_grows_until_there_is_a_factor() -> None:
    """Of 12 tokens H has rank 12, and with an input that stands there twice: only damping makes it a Hessian. With little of it, what the
    tokens do not see is free, and the error vanishes."""
    kernel, x = paper.correlated(64, 16, tokens=12)
    x[:, 9] = x[:, 8]
    given, hessian = Grid(4, 0), paper.second_moment(x) - 1e-3 * np.eye(64, dtype=np.float32)
    found, damp = gptq.solve(kernel, hessian, given, damp=1e-8, order="none")
    smallest = -np.linalg.eigvalsh(hessian.astype(np.float64))[0] / np.diagonal(hessian).mean()
    assert smallest < damp < 20 * smallest and np.log10(damp) == pytest.approx(round(np.log10(damp)), abs=1e-5)
    nearest = grid.round_to_nearest(kernel, given).dense(given)
    assert paper.output_error(kernel - found.dense(given), x) < 0.1 * paper.output_error(kernel - nearest, x)


@pytest.mark.parametrize("place", [(3, 3), (3, 4)])
def test_a_hessian_that_is_not_finite_is_told(place: tuple[int, int]) -> None:
    kernel, x = paper.correlated(16, 8)
    hessian = paper.second_moment(x)
    hessian[place] = hessian[place[::-1]] = np.nan
    assert not np.isfinite(gptq.solve(kernel, hessian, Grid(4, 0))[1])


def test_what_does_not_fit_is_refused() -> None:
    kernel, x = paper.correlated(16, 8)
    hessian = paper.second_moment(x)
    for order, given, match in (
        ("group", Grid(4, 8), "no neighbours"),
        ("act", Grid(4, 8), "Accepted: none, static, group"),
        ("none", Grid(4, 6), "does not cut"),
    ):
        with pytest.raises(ValueError, match=match):
            gptq.solve(kernel, hessian, given, order=order)


def test_programs_do_not_grow_with_the_matrix() -> None:
    """Loops are loops: the same number of operations for many blocks and groups as for few."""

    def operations(inputs: int) -> int:
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((inputs, 16), (inputs, inputs))]
        return gptq.solve.lower(*shapes, Grid(4, 64), block=32).as_text().count("\n")

    assert operations(512) == operations(4096)
