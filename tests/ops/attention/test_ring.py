"""Ring attention on 2, 4 and 8 pretend devices against `plain` on one: result, gradients, isolation, what is sent and kept."""

from collections import Counter
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_rows as rows
from jax.sharding import PartitionSpec

from jaxllm.data import places
from jaxllm.ops.attention import Mask, blocked, online, plain, ring

pytestmark = pytest.mark.usefixtures("compiled_anew")


def make_attend(case, order, share, **options):
    """`ring.attend` of a case, but for its arrays."""
    keys = None if case.keys == rows.LONG else jnp.arange(case.keys, dtype=jnp.int32)
    options = {"scale": case.scale, "block_tokens": rows.BLOCK, **options}
    return partial(ring.attend, places_T=jnp.asarray(order), key_places_S=keys, share=share, **options)


@lru_cache
def attend_on(name, mesh, manual):
    """The same function each time, so that it is compiled once."""
    case = rows.CASES[name]
    return make_attend(case, rows.order_of(case, mesh.shape["seq"]), rows.share_on(mesh, manual))


def run(name, mesh, arrays, manual=rows.rules.MESH_AXES, **options):
    """(out, gradients) by the devices of `mesh`, in the order of the row."""
    case = rows.CASES[name]
    order = rows.order_of(case, mesh.shape["seq"])
    mask, laid = rows.lay_out(case.mask, arrays, order)
    attend = attend_on(name, mesh, manual)
    return rows.put_back(rows.differentiate(partial(attend, **options) if options else attend, mask, *laid), order)


OTHERS = ("packed_window", "packed_prefix", "causal_window_in_order", "relative_bias", "cross")


@pytest.mark.parametrize(
    ("name", "devices"),
    [("packed", 2), ("packed", 4), *[(name, 4) for name in OTHERS], ("cross", 8), ("all_with_a_bias_a_row", 8)],
)
def test_devices_give_what_one_gives(name, devices):
    arrays = rows.draw(name)
    expected = rows.on_one_device(name, arrays)
    found = run(name, rows.make_mesh(seq=devices), arrays)
    rows.assert_near(found, expected, 2e-6)
    if name == "cross":
        blind = ~(rows.PACKED[:, :, None] == rows.SOURCE[:, None]).any(-1)
        assert blind.any() and np.all(np.asarray(found[0])[blind] == 0) and np.all(np.asarray(found[1][0])[blind] == 0)


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


def test_a_device_may_call_it_on_what_it_holds():
    """Without `share`, inside a shard_map of the caller's own, which is differentiated."""
    name, mesh = "all_with_one_bias", rows.make_mesh(seq=4)
    case, order, arrays = rows.CASES[name], places.zigzag(rows.LONG, 4), rows.draw(name)
    mask, laid = rows.lay_out(case.mask, arrays, order)

    def attend(q, k, v, mask, bias_XHTS):
        def own(q, k, v, mask, bias, places_T):
            return ring.attend(q, k, v, mask, places_T, bias_XHTS=bias, block_tokens=rows.BLOCK)

        cut, bias = PartitionSpec(None, "seq"), PartitionSpec(None, None, "seq")
        specs = (cut, cut, cut, cut, bias, PartitionSpec("seq"))
        each = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)
        return each(q, k, v, mask, bias_XHTS, jnp.asarray(order))

    found = rows.put_back(rows.differentiate(attend, mask, *laid), order)
    rows.assert_near(found, rows.on_one_device(name, arrays), 2e-6)


OUTER, INNER = ("pipe", "data", "fsdp"), ("seq", "tensor")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_a_scan_of_checkpointed_layers_in_a_region_of_other_axes(dtype):
    """Manual seq and tensor inside of manual pipe, data and fsdp, and the gradient taken between the two."""
    name, mesh = "all_with_one_bias", rows.make_mesh(data=2, seq=2, tensor=2)
    case, order = rows.CASES[name], places.zigzag(rows.LONG, 2)
    q, _, _, dout, bias = rows.draw(name)
    kernels = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, rows.HEADS, rows.WIDTH)), jnp.float32)

    def loss(attend, mask, kernels, bias, x, dout):
        def layer(x, kernels):
            q, k, v = (x * kernel.astype(dtype) for kernel in kernels)
            k, v = (y.reshape(*y.shape[:2], rows.KV_HEADS, -1, rows.WIDTH).mean(3) for y in (k, v))
            return (x + attend(q, k, v, mask, bias_XHTS=bias)).astype(dtype), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x.astype(dtype), kernels)
        return jnp.sum(x.astype(jnp.float32) * dout)

    def gradients(attend, *arrays):
        return jax.grad(partial(loss, attend), argnums=(1, 2, 3))(*arrays)

    def region(*arrays):
        attend = make_attend(case, order, rows.share_on(None, INNER))
        dkernels, dbias, dx = gradients(attend, *arrays)
        return jax.lax.psum(dkernels, OUTER), jax.lax.psum(dbias, OUTER), dx

    whole, row = PartitionSpec(), PartitionSpec(("data", "fsdp"))
    sharded = jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(row, whole, whole, row, row),
        out_specs=(whole, whole, row),
        axis_names=set(OUTER),
        check_vma=False,
    )
    expected = jax.jit(partial(gradients, partial(plain.attend, scale=case.scale)))(case.mask, kernels, bias, q, dout)
    mask, (q, _, _, dout, bias) = rows.lay_out(case.mask, [q, q, q, dout, bias], order)
    dkernels, dbias, dx = jax.jit(sharded)(mask, kernels, bias, q, dout)
    back = np.argsort(order)
    rows.assert_near((dkernels, dbias[:, :, back], dx[:, back]), expected, 2e-6 if dtype == jnp.float32 else 3e-2)


def test_a_document_changes_no_bit_of_another():
    arrays, mesh = rows.draw("packed"), rows.make_mesh(seq=4)
    junk = rows.draw("packed", seed=1)
    first = (rows.PACKED == 1)[:, :, None, None]
    changed = [*[jnp.where(first, 50 * new, old) for old, new in zip(arrays[:4], junk[:4], strict=True)], None]
    for before, after in zip(*[jax.tree.leaves(run("packed", mesh, x)) for x in (arrays, changed)], strict=True):
        others = np.broadcast_to(~first, before.shape)
        np.testing.assert_array_equal(before[others], after[others])
        assert not np.array_equal(before, after)


def show_kept(mesh, order, **options):
    """What dropout multiplies each probability with, [B, T, H, S] in the order of the row: of equal scores and one-hot values."""
    shape = (rows.BATCH, rows.LONG, rows.HEADS, rows.LONG)
    k = jnp.zeros((rows.BATCH, rows.LONG, rows.KV_HEADS, rows.LONG))
    v = jnp.broadcast_to(jnp.eye(rows.LONG)[order][None, :, None], k.shape)
    attend = partial(ring.attend, places_T=jnp.asarray(order), share=rows.share_on(mesh), block_tokens=rows.BLOCK, **options)
    out = jax.jit(attend)(jnp.zeros(shape), k, v, Mask())
    return np.asarray(out)[:, np.argsort(order)] * rows.LONG


def test_dropout_draws_for_each_pair_and_is_what_is_differentiated():
    mesh, order, frac = rows.make_mesh(data=2, seq=2, tensor=2), places.zigzag(rows.LONG, 2), 0.25
    options = {"rng": jax.random.key(3), "dropout_frac": frac}
    kept = show_kept(mesh, order, **options)
    np.testing.assert_allclose(kept[kept != 0], 1 / (1 - frac), rtol=1e-5)
    # Binomial over 204,800 draws: a standard deviation is 0.001.
    assert abs((kept != 0).mean() - (1 - frac)) < 0.005
    # Rows, heads, and quarters of a row on the same and on other devices: two draws agree with probability 0.75^2 + 0.25^2.
    draws = (kept != 0).transpose(0, 2, 1, 3).reshape(rows.BATCH, rows.HEADS, 4, rows.LONG // 4, 4, rows.LONG // 4)
    draws = draws.transpose(0, 1, 2, 4, 3, 5).reshape(-1, (rows.LONG // 4) ** 2)
    agree = (draws[:, None] == draws).mean(-1)[~np.eye(len(draws), dtype=bool)]
    assert abs(agree.mean() - 0.625) < 0.005 and agree.max() < 0.8  # 400 draws a pair: a standard deviation is 0.024

    def expect(q, k, v, mask, bias_XHTS):
        k, v = (jnp.repeat(x, rows.HEADS // rows.KV_HEADS, axis=2) for x in (k, v))
        scores = jnp.einsum("bthk,bshk->bths", q, k) * rows.WIDTH**-0.5 + bias_XHTS.transpose(0, 2, 1, 3)
        p = jax.nn.softmax(jnp.where(mask.visible_whole(rows.LONG, rows.LONG)[:, :, None], scores, -1e30), -1)
        return jnp.einsum("bths,bshk->bthk", p * kept, v)

    name = "all_with_one_bias"
    arrays = rows.draw(name)
    found = run(name, mesh, arrays, **options)
    rows.assert_near(found, rows.differentiate(expect, rows.CASES[name].mask, *arrays), 2e-6)


def compile_gradient(devices, mask, tokens):
    shapes = [jax.ShapeDtypeStruct((1, tokens, heads, 16), jnp.float32) for heads in (4, 2, 2, 4)]
    attend = partial(ring.attend, places_T=jnp.arange(tokens), share=rows.share_on(rows.make_mesh(seq=devices)))
    return rows.differentiate.lower(attend, mask, *shapes, None).compile()


def test_only_neighbours_talk_and_only_about_keys():
    program = compile_gradient(4, Mask(causal=True, segments_BT=jnp.ones((1, 64), jnp.int32)), 64)
    sent = Counter(rows.collectives(program))
    # k and v, segments and places: in the loop forward, before and in the loop backward; dk and dv in that loop and behind it.
    assert sent == {("collective-permute", "f32"): 3 * 2 + 2 * 2, ("collective-permute", "s32"): 3 * 2}


def test_memory_of_a_device_is_that_of_its_part():
    four, eight = (compile_gradient(devices, Mask(causal=True), 2**15).memory_analysis() for devices in (4, 8))
    assert eight.temp_size_in_bytes < 0.55 * four.temp_size_in_bytes
    # q, k, v and d out are the arguments; dq, dk, dv and what goes round are a few times as much.
    assert eight.temp_size_in_bytes < 3.5 * eight.argument_size_in_bytes
    # `blocked` on a single device keeps the probabilities, and takes more for a part of these rows.
    shapes = [jax.ShapeDtypeStruct((1, 1024, heads, 16), jnp.float32) for heads in (4, 2, 2, 4)]
    alone = rows.differentiate.lower(blocked.attend, Mask(causal=True), *shapes, None).compile().memory_analysis()
    assert eight.temp_size_in_bytes < alone.temp_size_in_bytes


def visits(order, devices, window_tokens=0):
    """int [devices, parts]: the pairs of blocks that a device computes of its queries and the keys of a part."""
    how = ring._Ring(True, window_tokens, 1.0, 0.0, rows.BLOCK, "seq", ring.here)

    def cut(part_T):
        x = jnp.zeros((1, len(part_T), 1, 1))
        return ring._cut(ring._Rows(x, x, x, *[None] * 6, part_T, part_T, *[None] * 3), how)[0]

    def count(own, other):
        start, stop = online.reach(ring._meet(own, ring._own_keys(other)), online.How(True, window_tokens, 1.0, 0.0, False))
        return (stop - start).sum()

    parts = jax.vmap(cut, axis_name="seq")(jnp.asarray(order).reshape(devices, -1))
    return np.asarray(jax.vmap(jax.vmap(count, (None, 0)), (0, None))(parts, parts))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_causal_work_is_equal_in_zigzag_in_whole_and_with_each_part(devices):
    tokens, halves = 8 * 2 * devices, 2  # two blocks of 4 a chunk
    in_zigzag, in_order = (visits(order, devices) for order in (places.zigzag(tokens, devices), places.plain(tokens)))
    whole = halves * halves
    diagonal = halves * (halves + 1) // 2
    apart = ~np.eye(devices, dtype=bool)
    assert np.all(in_zigzag[apart] == 2 * whole) and np.all(np.diag(in_zigzag) == whole + 2 * diagonal)
    assert np.array_equal(in_order, np.where(apart, 4 * whole * np.tri(devices), whole + 2 * diagonal))
    window = visits(places.plain(tokens), devices, window_tokens=4)
    assert np.all(window[np.subtract.outer(np.arange(devices), np.arange(devices)) > 1] == 0)


def test_arrays_that_do_not_fit_are_named():
    mesh, arrays = rows.make_mesh(seq=4), rows.draw("relative_bias")
    q, k, v, _, bias = arrays
    attend = partial(ring.attend, q, k, v, Mask(), share=rows.share_on(mesh))
    with pytest.raises(ValueError, match=r"places_T has shape \[10\] on a device; .*\n  Accepted: \[20\].\n"):
        attend(jnp.arange(40))
    with pytest.raises(ValueError, match=r"bias_XHTS has shape .*\n  Accepted: \[1, 8, 20, 80\] or \[4, 8, 20, 80\].\n"):
        attend(jnp.arange(80), bias_XHTS=bias[..., :20])
