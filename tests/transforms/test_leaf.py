"""What a kernel leaf does, and in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.transforms import leaf


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_einsum_computes_in_the_dtype_of_x_and_its_gradient_is_the_kernels(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), dtype)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 5)), jnp.float32)
    out, vjp = jax.vjp(lambda kernel: leaf.einsum("btd,dhk->bthk", x, kernel), kernel)
    assert out.dtype == dtype
    rounded = np.asarray(kernel.astype(dtype), np.float64)
    rtol = 1e-5 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
        np.asarray(out, np.float64), np.tensordot(np.asarray(x, np.float64), rounded, 1), rtol=rtol, atol=1e-2 * rtol
    )
    assert vjp(out)[0].dtype == jnp.float32


ORDERS = ["btd,dhk->bthk", "btd,dhk->bhtk", "btd,dhk->bhkt", "bth,dhk->btdk", "bhk,dhk->bd", "bdh,dhk->bk", "bhd,dhk->bk"]


@pytest.mark.parametrize("spec", ORDERS)
def test_einsum_is_that_of_numpy_in_any_order_of_axes(spec):
    """Only some are folded into matrices."""
    sizes, rng = dict(zip("btdhk", (2, 3, 4, 5, 6), strict=True)), np.random.default_rng(0)
    x, kernel = (rng.normal(size=[sizes[axis] for axis in axes]).astype(np.float32) for axes in spec.partition("->")[0].split(","))
    expected = np.einsum(spec, x.astype(np.float64), kernel)
    np.testing.assert_allclose(leaf.einsum(spec, x, kernel), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_take_gives_rows_and_sums_their_gradient_in_the_tables_dtype():
    table = jnp.arange(12.0).reshape(4, 3)
    # 300 times the same row: a bfloat16 sum would stop at 256.
    ids = jnp.array([[3] + [1] * 300])
    rows, vjp = jax.vjp(lambda table: leaf.take(table, ids, jnp.bfloat16), table)
    assert rows.shape == (1, 301, 3) and rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[0, :2].astype(jnp.float32), [[9, 10, 11], [3, 4, 5]])
    (gradient,) = vjp(jnp.ones_like(rows))
    np.testing.assert_array_equal(gradient, np.array([0, 300, 0, 1])[:, None] * np.ones(3))


def test_take_beyond_the_table_is_not_a_number():
    assert np.isnan(leaf.take(jnp.ones((4, 3)), jnp.array([4]), jnp.float32)).all()
