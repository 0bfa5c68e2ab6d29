"""Rows that devices share: cases, the numbers of one device by `plain`, and how to share out on a mesh of pretend devices."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxllm.data import places
from jaxllm.ops.attention import Mask, plain
from jaxllm.parallel import rules

# 8 devices in zigzag have two chunks of 5 each, in blocks of 3; no block divides the parts of 2 and 4 either.
BATCH, LONG, SHORT, HEADS, KV_HEADS, WIDTH, BLOCK = 4, 80, 40, 8, 2, 8, 4


def pack(*lengths, tokens=LONG):
    """Segments of a row; the rest is padding."""
    row = np.zeros(tokens, np.int32)
    row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return row


PACKED = np.stack([pack(33, 40), pack(1, 50, 29), pack(80), pack(7, 7, 7, 30)])
# In the second row, queries of segments 2 and 3 find no key of their own.
SOURCE = np.stack([pack(*sizes, tokens=SHORT) for sizes in ((20, 15), (40,), (31,), (5, 5, 5, 20))])
PREFIX = np.stack([np.isin(np.arange(LONG), (0, 1, 2, 33, 60)), np.arange(LONG) < 30, np.arange(LONG) < 45, np.zeros(LONG, bool)])
# Of each document a third is the trunk, and two answers follow.
FORKED = np.stack(
    [
        np.concatenate(
            [np.arange(size) * 3 // size for _, size in zip(*np.unique(row[row > 0], return_counts=True), strict=True)]
            + [row[row == 0]]
        )
        for row in PACKED
    ]
).astype(np.int32)


class Case(NamedTuple):
    mask: Mask
    zigzag: bool
    keys: int = LONG
    kv_heads: int = KV_HEADS
    bias_rows: int = 0
    scale: float | None = None


CASES = {
    "causal_window_in_order": Case(Mask(causal=True, window_tokens=13), zigzag=False, kv_heads=HEADS),
    "packed": Case(Mask(causal=True, segments_BT=PACKED), zigzag=True),
    "packed_window": Case(Mask(causal=True, window_tokens=9, segments_BT=PACKED), zigzag=True, kv_heads=1),
    "packed_prefix": Case(Mask(causal=True, segments_BT=PACKED, prefix_BS=PREFIX), zigzag=True),
    "packed_branches": Case(Mask(causal=True, segments_BT=PACKED, branches_BT=FORKED), zigzag=True),
    "window": Case(Mask(window_tokens=20), zigzag=False),
    "relative_bias": Case(Mask(segments_BT=PACKED), zigzag=False, bias_rows=1, scale=1.0),
    "cross": Case(Mask(segments_BT=PACKED, key_segments_BS=SOURCE), zigzag=False, keys=SHORT, scale=1.0),
    "all_with_a_bias_a_row": Case(Mask(True, 9, PACKED, None, PREFIX), zigzag=True, bias_rows=BATCH, scale=0.5),
    "all_with_one_bias": Case(Mask(True, 9, PACKED, None, PREFIX), zigzag=True, bias_rows=1),
}


def make_mesh(**sizes):
    """The five axes of the package, with these sizes."""
    shape = [sizes.get(axis, 1) for axis in rules.MESH_AXES]
    return jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def spec(axes, manual):
    """Logical axes on those mesh axes that are manual."""
    found = [tuple(mesh_axis for mesh_axis in rules.RULES[axis] if mesh_axis in manual) if axis else () for axis in axes]
    return PartitionSpec(*[entry or None for entry in found])


def share_on(mesh, manual=rules.MESH_AXES):
    """A `Share`. `mesh` None is the one of the shard_map around it."""

    def share(function, parts, out_axes):
        each = jax.shard_map(
            function,
            mesh=jax.sharding.get_abstract_mesh() if mesh is None else mesh,
            in_specs=tuple(spec(axes, manual) for _, axes in parts),
            out_specs=tuple(spec(axes, manual) for axes in out_axes),
            axis_names=set(manual),
            check_vma=False,
        )
        return each(*[array for array, _ in parts])

    return share


def draw(name, dtype=jnp.float32, seed=0):
    """[q, k, v, d out, bias or None], the row in its own order."""
    case, rng = CASES[name], np.random.default_rng(seed)
    sizes = (LONG, HEADS), (case.keys, case.kv_heads), (case.keys, case.kv_heads), (LONG, HEADS)
    arrays = [jnp.asarray(rng.normal(size=(BATCH, tokens, heads, WIDTH)), dtype) for tokens, heads in sizes]
    bias = rng.normal(size=(case.bias_rows, HEADS, LONG, case.keys)).astype(np.float32) if case.bias_rows else None
    return [*arrays, bias]


@partial(jax.jit, static_argnums=0)
def differentiate(attend, mask, q, k, v, dout, bias):
    """(out, (dq, dk, dv, dbias))"""
    out, vjp = jax.vjp(lambda q, k, v, bias: attend(q, k, v, mask, bias_XHTS=bias), q, k, v, bias)
    return out, vjp(dout)


def on_one_device(name, arrays):
    return differentiate(partial(plain.attend, scale=CASES[name].scale), CASES[name].mask, *arrays)


def order_of(case, parts):
    return places.zigzag(LONG, parts) if case.zigzag else places.plain(LONG)


def lay_out(mask, arrays, order):
    """The mask and [q, k, v, d out, bias] as devices hold them; keys of another length stay in their order."""
    q, k, v, dout, bias = arrays
    keys = order if k.shape[1] == len(order) else places.plain(k.shape[1])
    laid = Mask(
        mask.causal,
        mask.window_tokens,
        None if mask.segments_BT is None else mask.segments_BT[:, order],
        mask.key_segments_BS,
        None if mask.prefix_BS is None else mask.prefix_BS[:, keys],
        None if mask.branches_BT is None else mask.branches_BT[:, order],
    )
    return laid, [q[:, order], k[:, keys], v[:, keys], dout[:, order], None if bias is None else bias[:, :, order]]


def put_back(found, order):
    """(out, gradients) of rows as laid out, in their own order."""
    out, (dq, dk, dv, dbias) = found
    back = np.argsort(order)
    keys = back if dk.shape[1] == len(back) else slice(None)
    return out[:, back], (dq[:, back], dk[:, keys], dv[:, keys], None if dbias is None else dbias[:, :, back])


def assert_near(found, expected, tolerance):
    """Relative to the largest entry of each array."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        exact = np.asarray(other, np.float64)
        np.testing.assert_allclose(np.asarray(one, np.float64), exact, rtol=0, atol=tolerance * np.abs(exact).max())


def collectives(program):
    """(name, dtype) of each collective operation of a compiled program."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return [(name, dtype) for dtype, name in re.findall(rf"= \(?(\w+)\[.* ({names})(?:-start)?\(", program.as_text())]
