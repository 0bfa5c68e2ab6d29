"""GPTQ: weights are rounded one input after the other, and each makes up for the errors of those before it (Frantar et al. 2022,
arXiv:2210.17323).

The error of an output is d^T H d, where d is what rounding changed in its weights and H = X^T X of the layer's inputs. After each input
the paper moves all weights that are not rounded yet (eq. 2), by a row of the upper Cholesky factor of H^-1 (Algorithm 1). Here nothing is
moved ahead. With H = R^T R, R lower triangular, the error is the square of R d, and weight i, when its turn comes, makes up for what the
rows before it have left there:

    w_i + sum_{j < i} (R_ij / R_ii) d_j

which is the same number (Chen et al. 2025, arXiv:2507.18553: GPTQ is Babai's nearest plane algorithm). So H is factored once and never
inverted, a step reads the differences d and writes one row, and errors of float32 do not add up from row to row.

What rounding leaves of weight i adds its square times R_ii^2 to the error, all else having been made up for. So that is what the ranges of
groups are clipped by: most weights come out nearer for the few that lie beyond the last code.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxllm.compression import grid as grids
from jaxllm.compression.grid import Rounded, scale_shape
from jaxllm.transforms import affine
from jaxllm.transforms.affine import Grid

ORDERS = ("none", "static", "group")


class _Rows(NamedTuple):
    """Inputs in the order in which they are rounded, n of them.

    kernel: [n, O]. root: [n, n], R with each row divided by its diagonal. group: int32 [n], the row of their scales and zeros.
    """

    kernel: jax.Array
    root: jax.Array
    group: jax.Array


class _Scales(NamedTuple):
    """scale: [G, O]. zero: uint8 [G, O] or None."""

    scale: jax.Array
    zero: jax.Array | None


@partial(jax.jit, static_argnames=("grid", "order", "block"))
def solve(
    kernel_IO: jax.Array, hessian_II: jax.Array, grid: Grid, damp: float = 0.01, order: str = "static", block: int = 128
) -> tuple[Rounded, jax.Array]:
    """(codes, damping used) of a kernel whose inputs have the Hessian H = X^T X, times any number.

    order: "none": as they lie, the scales of a group being those of its weights as they are when its turn comes. "static": those with the
    largest H_ii first, with the scales of the weights as they were. "group": so, too, and groups are runs of that order, with scales as
    of "none"; the grid is ordered. Ranges are clipped (`grid.clip`) to what makes the smallest error.
    damp: what is added to the diagonal, as a share of its mean over the inputs that are not always 0. It is raised tenfold until the
    factor is finite; inf or NaN says that it never was, and the codes mean nothing.
    block: rows that are rounded between two products with all rows before them. The result does not depend on it.

    Inputs that are always 0 keep no weight. ValueError if groups of this size do not make up the inputs, or if the order is not of this
    grid.
    """
    shape = scale_shape(kernel_IO, grid)
    _check(order, grid)
    diagonal_I = jnp.diagonal(hessian_II)
    live_I = diagonal_I > 0
    kernel_IO = jnp.where(live_I[:, None], kernel_IO, 0)
    mean = jnp.sum(diagonal_I) / jnp.maximum(jnp.sum(live_I), 1)
    hessian_II = hessian_II / jnp.where(mean == 0, 1, mean) + jnp.diag(jnp.where(live_I, 0.0, 1.0))
    group_I = jnp.arange(len(live_I)) // (len(live_I) // shape[0])
    first_I = jnp.arange(len(live_I)) if order == "none" else jnp.argsort(-diagonal_I)
    place_I = jnp.argsort(first_I)
    root_II, cost_I, damp_used = _factor(hessian_II if order == "none" else hessian_II[first_I][:, first_I], damp)
    rows = _Rows(kernel_IO[first_I], root_II, group_I[first_I] if order == "static" else group_I)
    if order == "static" or shape[0] == 1:
        scales = _fitted(kernel_IO, cost_I[place_I], grid, shape)
        codes, _ = _in_blocks(rows, jnp.zeros_like(kernel_IO), scales, grid, block)
    else:
        codes, scales = _in_groups(rows, cost_I, grid, block)
    index = (group_I[place_I] if order == "group" else group_I).astype(jnp.int32)
    return Rounded(codes[place_I], *scales, index if grid.ordered else None), damp_used


def _check(order: str, grid: Grid) -> None:
    if order not in ORDERS:
        raise ValueError(f"order = {order!r} of GPTQ.\n  Accepted: {', '.join(ORDERS)}.\n  Change the order.")
    if order == "group" and not grid.ordered:
        raise ValueError(
            "order = 'group' of GPTQ makes groups of inputs that are no neighbours, and the grid holds runs of neighbours.\n"
            "  Accepted with it: a grid that is ordered.\n  Change the grid (quant.ordered), or the order to 'static'."
        )


def _factor(hessian_II: jax.Array, damp: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(R with each row divided by its diagonal, the squares of that, damping used): R^T R = H + damping I, R lower triangular.

    That is Cholesky's factor of the matrix read from its last row and column on.
    """
    turned_II, eye_II = jnp.flip(hessian_II), jnp.eye(len(hessian_II))

    def attempt(damp: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.linalg.cholesky(turned_II + damp * eye_II, symmetrize_input=False), damp

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.isfinite(state[0]).all() & jnp.isfinite(state[1])

    # A Hessian that is not finite stays so.
    first = jnp.where(jnp.isfinite(jnp.diagonal(hessian_II)).all(), jnp.float32(damp), jnp.nan)
    factor_II, used = jax.lax.while_loop(failed, lambda state: attempt(jnp.maximum(10 * state[1], 1e-6)), attempt(first))
    root_II = jnp.flip(factor_II.T)
    diagonal_I = jnp.diagonal(root_II)
    return root_II / diagonal_I[:, None], diagonal_I**2, used


def _fitted(kernel_IO: jax.Array, cost_I: jax.Array, grid: Grid, shape: tuple[int, int]) -> _Scales:
    """Of clipped ranges, by the sum of cost x distance^2 to the nearest codes. shape: (G, O)."""

    def error(off: jax.Array) -> jax.Array:
        # A product, since compilers make a slow loop of the sum over this axis.
        return jnp.einsum("gi,gio->go", cost_I.reshape(off.shape[:2]), off * off, precision="highest")

    return _Scales(*affine.scales(*grids.clip(kernel_IO, grid, shape, error), grid))


def _in_groups(rows: _Rows, cost_I: jax.Array, grid: Grid, block: int) -> tuple[jax.Array, _Scales]:
    """(uint8 codes [I, O], scales): one group after the other, on the grid of its weights as the groups before have moved them."""
    size, outputs = grid.group, rows.kernel.shape[1]

    def one(off_IO: jax.Array, number: jax.Array) -> tuple[jax.Array, tuple[jax.Array, _Scales]]:
        start = number * size
        root_gI, kernel_gO, cost_g = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (rows.root, rows.kernel, cost_I))
        root_gg = jax.lax.dynamic_slice_in_dim(root_gI, start, size, 1)
        left_gO = _product(root_gI, off_IO)
        # The least error would be that of weights that are not rounded: R (moved - kernel) takes all back that is left.
        moved_gO = kernel_gO + solve_triangular(root_gg, left_gO, lower=True, unit_diagonal=True)
        scales = _fitted(moved_gO, cost_g, grid, (1, outputs))
        part = _Rows(kernel_gO, root_gg, jnp.zeros(size, jnp.int32))
        codes, off_gO = _in_blocks(part, left_gO, scales, grid, block)
        return jax.lax.dynamic_update_slice_in_dim(off_IO, off_gO, start, 0), (codes, scales)

    _, (codes, scales) = jax.lax.scan(one, jnp.zeros_like(rows.kernel), jnp.arange(len(rows.kernel) // size))
    return codes.reshape(rows.kernel.shape), jax.tree.map(lambda x: x.reshape(-1, outputs), scales)


def _in_blocks(rows: _Rows, left_nO: jax.Array, scales: _Scales, grid: Grid, block: int) -> tuple[jax.Array, jax.Array]:
    """(uint8 codes, differences) [n, O], one block of rows after the other; left_nO: what rows before all of these have left."""
    number, outputs = rows.kernel.shape
    if number <= block:
        return _row_by_row(rows, left_nO, scales, grid)
    count = -(-number // block)
    size = -(-number // count)
    more = count * size - number
    # Rows behind all others that change nothing.
    padded = _Rows(
        jnp.pad(rows.kernel, ((0, more), (0, 0))), jnp.pad(rows.root, ((0, more), (0, more))), jnp.pad(rows.group, (0, more))
    )
    left_nO = jnp.pad(left_nO, ((0, more), (0, 0)))

    def one(off_nO: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = index * size
        kernel, root, group, left = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (*padded, left_nO))
        part = _Rows(kernel, jax.lax.dynamic_slice_in_dim(root, start, size, 1), group)
        codes, off_BO = _row_by_row(part, left + _product(root, off_nO), scales, grid)
        return jax.lax.dynamic_update_slice_in_dim(off_nO, off_BO, start, 0), codes

    off_nO, codes = jax.lax.scan(one, jnp.zeros_like(padded.kernel), jnp.arange(count))
    return codes.reshape(-1, outputs)[:number], off_nO[:number]


def _row_by_row(rows: _Rows, left_BO: jax.Array, scales: _Scales, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """(uint8 codes, differences) [B, O]."""

    def one(off_BO: jax.Array, row: tuple[jax.Array, _Rows, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, (kernel_O, root_B, group), left_O = row
        scale_O, zero_O = jax.tree.map(lambda x: x[group], scales)
        codes_O = affine.nearest(kernel_O + left_O + _product(root_B, off_BO), scale_O, zero_O, grid)
        zero_O = grid.middle if zero_O is None else zero_O.astype(jnp.float32)
        off_O = kernel_O - (codes_O - zero_O) * scale_O.astype(jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(off_BO, off_O, index, 0), codes_O.astype(jnp.uint8)

    off_BO, codes = jax.lax.scan(one, jnp.zeros_like(rows.kernel), (jnp.arange(len(rows.kernel)), rows, left_BO))
    return codes, off_BO


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in float32 proper, where a device would take fewer bits."""
    return jnp.matmul(x, y, precision="highest")
