"""Every attention backend against a NumPy loop, the isolation of documents, gradients, dropout and sharding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm import registry
from jaxllm.ops import attention

BACKENDS = registry.names("attention")
# Two documents and padding; three documents of odd lengths, one of a single token.
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 7 + [2] + [3] * 5], np.int32)


def make_qkv(tokens=13, heads=6, kv_heads=2, width=8, batch=2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(batch, tokens, n, width)), dtype) for n in (heads, kv_heads, kv_heads)]


def oracle(q, k, v, visible):
    """Vaswani et al. 2017, eq. 1, one query and head at a time in float64; visible(b, t, s) says which keys count."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = [s for s in range(k.shape[1]) if visible(b, t, s)]
        scores = np.array([q[b, t, h] @ k[b, s, g] for s in seen]) / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, g]
    return out


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("segmented", "block_tokens"), [(False, 5), (True, 4), (True, 64)])
def test_backend_is_causal_grouped_attention_inside_segments(name, kv_heads, segmented, block_tokens):
    q, k, v = make_qkv(kv_heads=kv_heads)
    segments = SEGMENTS if segmented else None
    out = jax.jit(partial(registry.resolve("attention", name), block_tokens=block_tokens))(q, k, v, segments_BT=segments)
    expected = oracle(q, k, v, lambda b, t, s: s <= t and (not segmented or SEGMENTS[b, s] == SEGMENTS[b, t]))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_fewer_queries_than_keys_are_the_last_ones(name):
    q, k, v = make_qkv()
    backend = partial(registry.resolve("attention", name), block_tokens=4)
    whole = jax.jit(backend)(q, k, v, segments_BT=SEGMENTS)
    part = jax.jit(backend)(q[:, 7:], k, v, segments_BT=SEGMENTS[:, 7:], key_segments_BS=SEGMENTS)
    np.testing.assert_allclose(part, whole[:, 7:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_other_documents_and_the_future_change_no_bit(name):
    backend = jax.jit(partial(registry.resolve("attention", name), block_tokens=4))
    own, other = make_qkv(), make_qkv(seed=1)

    def run(replaced):
        return np.asarray(
            backend(
                *[jnp.where(replaced[:, :, None, None], 50 * b, a) for a, b in zip(own, other, strict=True)], segments_BT=SEGMENTS
            )
        )

    before = run(np.zeros_like(SEGMENTS, bool))
    for document in (1, 2, 3):
        replaced = document != SEGMENTS
        np.testing.assert_array_equal(run(replaced)[~replaced], before[~replaced])
    future = np.broadcast_to(np.arange(13) >= 9, SEGMENTS.shape)
    np.testing.assert_array_equal(run(future)[~future], before[~future])
    assert not np.array_equal(run(future), before)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradient_equals_finite_difference_and_stays_inside_the_document(name):
    backend = partial(registry.resolve("attention", name), segments_BT=SEGMENTS, block_tokens=4)
    qkv, direction = make_qkv(), make_qkv(seed=2)
    weights = make_qkv(tokens=qkv[0].shape[1], width=qkv[0].shape[3], seed=3)[0]

    @jax.jit
    def slopes(weights):
        return jax.grad(lambda q, k, v: jnp.sum(weights * backend(q, k, v)), (0, 1, 2))(*qkv)

    def side(step):
        moved = [np.asarray(x, np.float64) + step * np.asarray(d, np.float64) for x, d in zip(qkv, direction, strict=True)]
        out = oracle(*moved, lambda b, t, s: s <= t and SEGMENTS[b, s] == SEGMENTS[b, t])
        return np.sum(np.asarray(weights, np.float64) * out)

    slope = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(slopes(weights), direction, strict=True))
    # Central difference in float64: its own error is about 1e-9.
    np.testing.assert_allclose(slope, (side(1e-5) - side(-1e-5)) / 2e-5, rtol=2e-6)
    for gradient in slopes(weights * (SEGMENTS == 2)[:, :, None, None]):
        assert np.all(np.asarray(gradient)[SEGMENTS != 2] == 0)
        assert np.any(np.asarray(gradient)[SEGMENTS == 2] != 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backends_agree_in_value_and_gradient(dtype):
    qkv = make_qkv(tokens=37, width=16, dtype=dtype)
    segments = np.sort(np.random.default_rng(5).integers(0, 4, (2, 37)), axis=1)
    weights = make_qkv(tokens=qkv[0].shape[1], width=qkv[0].shape[3], seed=3)[0]

    def run(backend):
        def loss(*arrays):
            out = backend(*arrays, segments_BT=segments, block_tokens=16)
            return jnp.sum(weights * out), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)

    first, *others = [jax.tree.leaves(run(registry.resolve("attention", name))) for name in BACKENDS]
    # float32: a few roundings of sums of 37 terms. bfloat16: 2^-8 of rounding in probabilities and results.
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a.dtype == b.dtype == dtype
            wide = np.asarray(a, np.float32)
            assert np.abs(wide - np.asarray(b, np.float32)).max() <= tolerance * np.abs(wide).max()


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_scores_are_summed_in_float32(name):
    # q k = 256 + 1 in 2 x 128 + 1 parts: bfloat16 sums would lose the 1 and the two keys would tie.
    width = 257
    q = jnp.ones((1, 2, 1, width), jnp.bfloat16)
    k = jnp.stack([jnp.ones(width).at[-1].set(0), jnp.ones(width)])[None, :, None].astype(jnp.bfloat16)
    v = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, width))
    out = registry.resolve("attention", name)(q, k, v.astype(jnp.bfloat16))
    expected = 1 / (1 + np.exp(-1 / np.sqrt(width)))
    assert abs(float(out[0, 1, 0, 0]) - expected) < 2**-8 * expected < abs(0.5 - expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_dropout_scales_what_it_keeps_and_draws_independently(name):
    tokens, frac = 24, 0.25
    q, k, _ = make_qkv(tokens=tokens, batch=64, width=tokens)
    # v is one-hot in its position, so the output shows the probabilities themselves.
    v = jnp.broadcast_to(jnp.eye(tokens)[None, :, None], k.shape)
    backend = jax.jit(partial(registry.resolve("attention", name), block_tokens=16), static_argnames="dropout_frac")
    full = np.asarray(backend(q, k, v))
    first, second = (np.asarray(backend(q, k, v, rng=jax.random.key(seed), dropout_frac=frac)) for seed in (0, 1))
    visible = np.broadcast_to(np.tri(tokens, dtype=bool)[:, None], full.shape)
    kept = first != 0
    np.testing.assert_allclose(first[kept], full[kept] / (1 - frac), rtol=1e-5)
    # Binomial over 115,200 draws: one standard deviation is 0.0013.
    assert abs(kept[visible].mean() - (1 - frac)) < 0.006
    # Rngs, heads and rows draw independently: two masks agree with probability 0.75^2 + 0.25^2.
    pairs = (
        (first, second, visible),
        (first[:, :, :3], first[:, :, 3:], visible[:, :, :3]),
        (first[:32], first[32:], visible[:32]),
    )
    for a, b, where in pairs:
        assert abs(((a != 0) == (b != 0))[where].mean() - 0.625) < 0.01
    # So do blocks: entry i of the first block of 16 x 16 and of the second one of 8 x 24, where both are visible.
    entry = np.arange(8 * 24)
    early, late = (0, entry // 16, 0, entry % 16), (0, 16 + entry // 24, 0, entry % 24)
    assert (kept[early] == kept[late])[visible[early] & visible[late]].mean() < 0.85
    np.testing.assert_array_equal(backend(q, k, v, rng=jax.random.key(0), dropout_frac=0.0), full)


def test_cached_sees_the_slots_up_to_its_position():
    q, k, v = make_qkv(tokens=5)
    _, k, v = make_qkv(tokens=11)
    positions = np.array([[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]])
    out = jax.jit(attention.cached)(q, k, v, positions)
    np.testing.assert_allclose(out, oracle(q, k, v, lambda b, t, s: s <= positions[b, t]), rtol=0, atol=1e-6)
    # What lies in later slots (a longer row's keys, an earlier request) changes no bit.
    junk = (np.arange(11) > positions[:, -1:])[:, :, None, None]
    changed = jax.jit(attention.cached)(q, jnp.where(junk, 1e4, k), jnp.where(junk, 1e4, v), positions)
    np.testing.assert_array_equal(changed, out)
    one = jax.jit(attention.cached)(q[:, 2:3], k, v, positions[:, 2:3])
    np.testing.assert_allclose(one, out[:, 2:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_devices_with_rows_and_heads_of_their_own_need_not_talk(name):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    layout = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def loss(q, k, v, segments):
        return registry.resolve("attention", name)(q, k, v, segments_BT=segments, block_tokens=8)

    def vjp(q, k, v, segments, dout):
        return jax.vjp(partial(loss, segments=segments), q, k, v)[1](dout)

    qkv = make_qkv()
    run = jax.jit(vjp, in_shardings=(layout, layout, layout, rows, layout), out_shardings=layout)
    text = run.lower(*qkv, SEGMENTS, qkv[0]).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {collective}(" not in text


def test_shapes_that_do_not_fit_are_named():
    q, k, v = make_qkv(heads=6, kv_heads=4)
    with pytest.raises(ValueError, match=r"4 key/value heads do not divide 6 query heads.\n  Accepted: 1, 2, 3, 6."):
        attention.blocked(q, k, v)
    q, k, v = make_qkv()
    with pytest.raises(ValueError, match="13 queries but 12 keys"):
        attention.plain(q, k[:, 1:], v[:, 1:])
