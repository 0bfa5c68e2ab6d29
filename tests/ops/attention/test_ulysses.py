"""Attention by an exchange of heads on 2, 4 and 8 pretend devices against `plain` on one, and what is sent."""

from collections import Counter
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_rows as rows
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.ops.attention import Mask, blocked, flash, plain, ulysses
from jaxllm.ops.attention.share import QUERIES, TOKENS

pytestmark = pytest.mark.usefixtures("compiled_anew")


@lru_cache
def attend_on(name, mesh, manual, inner):
    """The same function each time, so that it is compiled once."""
    share, case = rows.share_on(mesh, manual), rows.CASES[name]
    return partial(ulysses.attend, share=share, scale=case.scale, block_tokens=32, inner=inner)


def run(name, mesh, arrays, manual=rows.rules.MESH_AXES, inner=blocked):
    """(out, gradients) by the devices of `mesh`."""
    return rows.differentiate(attend_on(name, mesh, manual, inner.attend), rows.CASES[name].mask, *arrays)


OTHERS = ("packed_window", "packed_prefix", "window", "relative_bias", "cross")


@pytest.mark.parametrize(
    ("name", "devices", "inner"),
    [*[(name, 4, blocked) for name in OTHERS], ("packed", 2, plain), ("packed", 8, flash), ("all_with_a_bias_a_row", 8, plain)],
)
def test_devices_give_what_one_gives(name, devices, inner):
    arrays = rows.draw(name)
    found = run(name, rows.make_mesh(seq=devices), arrays, inner=inner)
    rows.assert_near(found, rows.on_one_device(name, arrays), 2e-6)


@pytest.mark.parametrize(
    ("name", "manual"),
    [
        ("all_with_one_bias", rows.rules.MESH_AXES),
        ("all_with_one_bias", ("seq", "tensor")),
        ("all_with_one_bias", ("seq",)),
        ("all_with_a_bias_a_row", rows.rules.MESH_AXES),
    ],
)
def test_other_axes_may_be_manual_or_the_compilers(name, manual):
    arrays = rows.draw(name)
    found = run(name, rows.make_mesh(data=2, seq=2, tensor=2), arrays, manual)
    rows.assert_near(found, rows.on_one_device(name, arrays), 2e-6)


def test_in_a_scan_of_checkpointed_layers_in_a_region_of_other_axes():
    """Manual seq and tensor inside of manual pipe, data and fsdp, and the gradient taken between the two."""
    name, mesh, outer = "all_with_one_bias", rows.make_mesh(data=2, seq=2, tensor=2), ("pipe", "data", "fsdp")
    q, k, v, dout, bias = rows.draw(name)
    kernels = jnp.asarray(np.random.default_rng(1).normal(size=(2, rows.HEADS, rows.WIDTH)), jnp.float32)

    def gradients(attend, mask, kernels, bias, x, k, v, dout):
        def loss(kernels, bias, x):
            def layer(x, kernel):
                return x + attend(x * kernel, k, v, mask, bias_XHTS=bias), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, kernels)[0] * dout)

        return jax.grad(loss, argnums=(0, 1, 2))(kernels, bias, x)

    def region(*arrays):
        dkernels, dbias, dx = gradients(partial(ulysses.attend, share=rows.share_on(None, ("seq", "tensor"))), *arrays)
        return jax.lax.psum(dkernels, outer), jax.lax.psum(dbias, outer), dx

    whole, row = PartitionSpec(), PartitionSpec(("data", "fsdp"))
    in_specs, out_specs = (row, whole, whole, row, row, row, row), (whole, whole, row)
    sharded = jax.shard_map(region, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(outer), check_vma=False)
    arrays = rows.CASES[name].mask, kernels, bias, q, k, v, dout
    rows.assert_near(jax.jit(sharded)(*arrays), jax.jit(partial(gradients, plain.attend))(*arrays), 2e-6)


def test_bfloat16_is_as_near_as_its_rounding():
    arrays = rows.draw("packed", jnp.bfloat16)
    found = run("packed", rows.make_mesh(seq=4), arrays)
    assert [x.dtype for x in jax.tree.leaves(found)] == [jnp.bfloat16] * 4
    exact = [None if x is None else x.astype(jnp.float32) for x in arrays]
    rows.assert_near(found, rows.on_one_device("packed", exact), 2e-2)


def test_a_document_changes_no_bit_of_another():
    arrays, junk, mesh = rows.draw("packed"), rows.draw("packed", seed=1), rows.make_mesh(seq=4)
    first = (rows.PACKED == 1)[:, :, None, None]
    changed = [*[jnp.where(first, 50 * new, old) for old, new in zip(arrays[:4], junk[:4], strict=True)], None]
    for before, after in zip(*[jax.tree.leaves(run("packed", mesh, x)) for x in (arrays, changed)], strict=True):
        others = np.broadcast_to(~first, before.shape)
        np.testing.assert_array_equal(before[others], after[others])
        assert not np.array_equal(before, after)


def test_each_device_drops_others():
    mesh, frac = rows.make_mesh(data=2, seq=2, tensor=2), 0.5
    # Equal scores and one-hot values: the result shows which probabilities were kept.
    q = jnp.zeros((rows.BATCH, rows.LONG, rows.HEADS, rows.LONG))
    v = jnp.broadcast_to(jnp.eye(rows.LONG)[:, None], (rows.BATCH, rows.LONG, rows.KV_HEADS, rows.LONG))
    attend = partial(ulysses.attend, share=rows.share_on(mesh), rng=jax.random.key(0), dropout_frac=frac)
    kept = np.asarray(jax.jit(attend)(q, jnp.zeros_like(v), v, Mask())) != 0
    draws = kept.transpose(0, 2, 1, 3).reshape(rows.BATCH * rows.HEADS, -1)
    agree = (draws[:, None] == draws).mean(-1)[~np.eye(len(draws), dtype=bool)]
    assert abs(kept.mean() - frac) < 0.005  # 204,800 draws: a standard deviation is 0.001
    assert np.abs(agree - 0.5).max() < 0.04  # 6400 draws a pair: a standard deviation is 0.006


def test_what_is_sent_is_heads_and_the_segments_of_whole_rows():
    mesh, name, cut = rows.make_mesh(data=2, seq=2, tensor=2), "all_with_one_bias", ("data", "fsdp", "seq", "tensor")

    def place(array, axes):
        return jax.device_put(array, NamedSharding(mesh, rows.spec(axes, cut)))

    *arrays, bias = rows.draw(name)
    arrays = [*[place(x, QUERIES) for x in arrays], place(bias, (None, "heads", "length", None))]
    mask = jax.tree.map(lambda x: place(x, TOKENS), rows.CASES[name].mask)
    shardings = [x.sharding for x in arrays]
    run = jax.jit(
        partial(rows.differentiate, attend_on(name, mesh, cut, blocked.attend)),
        out_shardings=(shardings[0], (*shardings[:3], shardings[4])),
    )
    # q, k, v, the bias, the result, and the gradient of each; segments and prefix. Rows that share a bias sum its gradient.
    assert Counter(rows.collectives(run.lower(mask, *arrays).compile())) == {
        ("all-to-all", "f32"): 5 + 5,
        ("all-gather", "s32"): 1,
        ("all-gather", "pred"): 1,
        ("all-reduce", "f32"): 1,
    }


def test_heads_that_cannot_be_shared_out_are_refused():
    q, k, v, *_ = rows.draw("packed")
    attend = partial(ulysses.attend, share=rows.share_on(rows.make_mesh(seq=4)))
    message = (
        r"6 query heads \(model.heads / parallel.tensor\) for parallel.seq = 4 devices.\n  Accepted: parallel.seq = 1, 2, 3, 6.\n"
    )
    with pytest.raises(ValueError, match=message):
        attend(q[:, :, :6], k, v, Mask())
