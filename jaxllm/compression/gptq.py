"""GPTQ: weights rounded one input after the other, the rest making up for the error (Frantar et al. 2022, arXiv:2210.17323).

The error of the outputs is d^T H d for each output, H the sum of x x^T over the calibration data. When input i is rounded, what is
left is moved by the least squares solution for its error, which Cholesky's factor of H^-1 gives for all inputs at once (Algorithm 1).
Blocks of inputs update what lies behind them once, with one product (section 3.3, step 2).

Deviation from the authors' program: a block never begins inside a group, so that the scales of a group are those of weights that all
earlier inputs have moved, as the paper has it. There, with groups smaller than a block, the moves within the block are not in yet.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.compression.grid import Rounded
from jaxllm.transforms import affine
from jaxllm.transforms.affine import Grid

BLOCK = 128
# Damping is raised to this at least: about what float32 can tell from the diagonal.
LEAST_RAISED = 1e-7
# In which order inputs are rounded: as they lie; those with the largest H_ii first, in groups of neighbours, whose scales are those of the
# weights as they were; or so, in groups of what follows each other in that order.
ORDERS = ("none", "static", "group")


class Solved(NamedTuple):
    """damp: the share of the mean of H's diagonal that was added to it."""

    rounded: Rounded
    damp: jax.Array


@partial(jax.jit, static_argnames=("grid", "order"))
def solve(kernel_IO: jax.Array, hessian_II: jax.Array, grid: Grid, damp: float = 0.01, order: str = "static") -> Solved:
    """Codes of a kernel [I, O] for inputs with this sum of x x^T. `grid.ordered` goes with the order "group".

    Inputs that are always 0 keep no weight. Where rounding makes H + damp x mean(diagonal) indefinite, damp is raised tenfold, to 1e-7 at
    least, until not.
    """
    inputs = len(kernel_IO)
    diagonal_I = jnp.diagonal(hessian_II)
    dead_I = diagonal_I <= 0
    kernel_IO = jnp.where(dead_I[:, None], 0.0, kernel_IO.astype(jnp.float32))
    hessian_II = hessian_II + jnp.diag(dead_I.astype(jnp.float32))
    static = _static(kernel_IO, grid) if order == "static" else None
    order_I = jnp.arange(inputs) if order == "none" else jnp.argsort(-diagonal_I)
    factor_II, damp_used = _factor(hessian_II[order_I][:, order_I], damp)
    found = _sweep(kernel_IO[order_I], factor_II, grid, static, order_I)
    place_I = jnp.argsort(order_I)
    groups = (jnp.arange(inputs) // (grid.group or inputs))[place_I].astype(jnp.int32) if grid.ordered else None
    return Solved(Rounded(found.codes[place_I], found.scale, found.zero, groups), damp_used)


def _static(kernel_IO: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero) of groups of neighbours."""
    shape = (len(kernel_IO) // (grid.group or len(kernel_IO)), kernel_IO.shape[1])
    return affine.scales(*affine.limits(kernel_IO, grid, shape), grid)


def _factor(hessian_II: jax.Array, damp: float) -> tuple[jax.Array, jax.Array]:
    """(U, damp): U^T U = (H + damp mean(diagonal) I)^-1, U upper triangular.

    Of H = V V^T, V upper triangular, it is U = V^-1, without H^-1. V is Cholesky's factor of H turned around, turned around.
    """
    mean = jnp.diagonal(hessian_II).mean()

    def upper(damp: jax.Array) -> jax.Array:
        damped = hessian_II + damp * mean * jnp.eye(len(hessian_II))
        return jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Ten times nothing is nothing: without a least share, damp = 0 would never end.
        raised = jnp.maximum(state[1] * 10, LEAST_RAISED)
        return upper(raised), raised

    first = jnp.asarray(damp, jnp.float32)
    v_II, used = jax.lax.while_loop(lambda state: ~jnp.isfinite(state[0]).all() & (state[1] < 1e3), more, (upper(first), first))
    return jax.scipy.linalg.solve_triangular(v_II, jnp.eye(len(v_II)), lower=False), used


class _State(NamedTuple):
    """kernel: what is left, moved by the rounded inputs. The others are filled in block by block; `now`: (scale, zero) of the group."""

    kernel: jax.Array
    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    now: tuple[jax.Array, jax.Array | None]


def _sweep(
    kernel_IO: jax.Array,
    factor_II: jax.Array,
    grid: Grid,
    static: tuple[jax.Array, jax.Array | None] | None,
    order_I: jax.Array,
) -> Rounded:
    """Rounds all inputs in the order in which they are given; order_I: which ones they are, for the `static` scales."""
    inputs, outputs = kernel_IO.shape
    group = grid.group or inputs
    block = _block(grid.group)
    padded = -(-inputs // block) * block
    more = padded - inputs  # inputs that are nothing, behind all others
    kernel_IO = jnp.pad(kernel_IO, ((0, more), (0, 0)))
    factor_II = jnp.pad(factor_II, ((0, more), (0, more))) + jnp.diag((jnp.arange(padded) >= inputs).astype(jnp.float32))
    order_I = jnp.pad(order_I, (0, more))

    def one(number: jax.Array, state: _State) -> _State:
        start = number * block
        left_BO = jax.lax.dynamic_slice_in_dim(state.kernel, start, block)
        if static is None:
            now = jax.lax.cond(start % group == 0, lambda: _scales(state.kernel, start, group, grid), lambda: state.now)
            place = start // group
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=0)
            state = state._replace(
                now=now,
                scale=put(state.scale, now[0]),
                zero=None if state.zero is None or now[1] is None else put(state.zero, now[1]),
            )
            scale_BO, zero_BO = jax.tree.map(lambda x: jnp.broadcast_to(x, (block, outputs)), now)
        else:
            group_B = jax.lax.dynamic_slice_in_dim(order_I, start, block) // group
            scale_BO, zero_BO = jax.tree.map(lambda x: x[group_B], static)
        rows_BI = jax.lax.dynamic_slice_in_dim(factor_II, start, block)
        codes_BO, errors_BO = _round_block(left_BO, jax.lax.dynamic_slice_in_dim(rows_BI, start, block, 1), scale_BO, zero_BO, grid)
        behind_BI = jnp.where(jnp.arange(padded) >= start + block, rows_BI, 0)
        kernel = state.kernel - jnp.matmul(behind_BI.T, errors_BO, precision="highest")
        return state._replace(kernel=kernel, codes=jax.lax.dynamic_update_slice_in_dim(state.codes, codes_BO, start, 0))

    first = _scales(kernel_IO, 0, group, grid) if static is None else (static[0][:1], None if static[1] is None else static[1][:1])
    count = inputs // group
    scale, zero = static or (
        jnp.zeros((count, outputs), first[0].dtype),
        None if first[1] is None else jnp.zeros((count, outputs), jnp.uint8),
    )
    state = _State(kernel_IO, jnp.zeros((padded, outputs), jnp.uint8), scale, zero, first)
    state = jax.lax.fori_loop(0, padded // block, one, state)
    return Rounded(state.codes[:inputs], state.scale, state.zero, None)


def _block(group: int) -> int:
    """Inputs of a block: no group begins or ends inside of one."""
    if not group:
        return BLOCK
    return next(size for size in range(min(BLOCK, group), 0, -1) if group % size == 0)


def _scales(kernel_IO: jax.Array, start: jax.Array | int, group: int, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero) [1, O] of the group that begins there."""
    part_IO = jax.lax.dynamic_slice_in_dim(kernel_IO, start, group)
    return affine.scales(*affine.limits(part_IO, grid, (1, part_IO.shape[1])), grid)


def _round_block(
    left_BO: jax.Array, factor_BB: jax.Array, scale_BO: jax.Array, zero_BO: jax.Array | None, grid: Grid
) -> tuple[jax.Array, jax.Array]:
    """(codes, errors / diagonal of the factor) of a block, input by input."""

    def one(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        left_BO, codes_BO, errors_BO = state
        weight_O, scale_O = left_BO[index], scale_BO[index]
        zero_O = None if zero_BO is None else zero_BO[index]
        code_O = affine.nearest(weight_O, scale_O, zero_O, grid)
        value_O = (code_O - (grid.middle if zero_O is None else zero_O.astype(jnp.float32))) * scale_O.astype(jnp.float32)
        error_O = (weight_O - value_O) / factor_BB[index, index]
        # Rows of the factor are 0 before the diagonal: what is rounded already stays.
        left_BO = left_BO - factor_BB[index][:, None] * error_O
        return left_BO, codes_BO.at[index].set(code_O.astype(jnp.uint8)), errors_BO.at[index].set(error_O)

    zeros = jnp.zeros_like(left_BO)
    _, codes_BO, errors_BO = jax.lax.fori_loop(0, len(left_BO), one, (left_BO, zeros.astype(jnp.uint8), zeros))
    return codes_BO, errors_BO
