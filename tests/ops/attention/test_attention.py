"""Every implementation of attention, for every kind of mask, against a NumPy loop: result, gradients, isolation, blind rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import registry
from jaxllm.ops import attention
from jaxllm.ops.attention import Mask, blocked, fallback, splash

BATCH, HEADS, WIDTH, BLOCK = 2, 4, 8, 8
LONG, SHORT = 21, 13  # no block divides them
# Two documents and padding; three documents, one of a single token.
PACKED = np.array([[1] * 9 + [2] * 8 + [0] * 4, [1] * 11 + [2] + [3] * 9], np.int32)
PADDED = np.array([[1] * 21, [1] * 15 + [0] * 6], np.int32)
# Keys of a source; in the second row queries of segments 2 and 3 find none of their own.
SOURCE = np.array([[1] * 6 + [2] * 5 + [0] * 2, [1] * 10 + [4] * 3], np.int32)
# In the second row longer than a block of queries, and none in its third document.
PREFIX = np.array([np.isin(np.arange(LONG), (0, 1, 2, 9, 10, 12)), np.arange(LONG) < 10])
# Two answers each; three and a branch without a trunk.
FORKED = np.array(
    [[0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0], [0] * 4 + [1, 1, 1, 2, 2, 3, 3, 1, 0, 1, 1] + [2] * 6],
    np.int32,
)

# name: (mask, queries, keys, key/value heads, bias rows, scale)
CASES = {
    "causal": (Mask(causal=True), LONG, LONG, 2, 0, None),
    "causal_window_last_queries": (Mask(causal=True, window_tokens=4), SHORT, LONG, 1, 0, None),
    "packed_window": (Mask(causal=True, window_tokens=5, segments_BT=PACKED), LONG, LONG, 2, 0, None),
    "packed_prefix": (Mask(causal=True, segments_BT=PACKED, prefix_BS=PREFIX), LONG, LONG, 2, 0, None),
    "packed_branches": (Mask(causal=True, segments_BT=PACKED, branches_BT=FORKED), LONG, LONG, 2, 0, None),
    "branches_last_queries_bias": (Mask(causal=True, branches_BT=FORKED[:, 8:], key_branches_BS=FORKED), SHORT, LONG, 4, 2, None),
    "bidirectional_bias": (Mask(), LONG, LONG, 4, 2, None),
    "window_padding": (Mask(window_tokens=6, segments_BT=PADDED), LONG, LONG, 2, 0, None),
    "cross": (Mask(segments_BT=PACKED, key_segments_BS=SOURCE), LONG, SHORT, 2, 0, 1.0),  # T5's
    "all_with_one_bias": (Mask(True, 5, PACKED[:, 8:], PACKED, PREFIX), SHORT, LONG, 2, 1, 1.0),
}
SPLASH = ("causal", "packed_window", "window_padding", "cross")
BACKENDS = [name for name in registry.names("attention") if name != "splash"]
KERNELS = {name: registry.resolve("attention", name) for name in BACKENDS}
KERNELS["splash"] = partial(splash.attend, interpret=True)  # `attention.attend` would leave the work to `blocked` on this machine


MATRIX = [(name, case) for case in CASES for name in BACKENDS] + [("splash", case) for case in SPLASH]


def make_arrays(case, dtype=jnp.float32, seed=0):
    """[q, k, v, d out, bias or None] of a case."""
    _, queries, keys, kv_heads, bias_rows, _ = CASES[case]
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, queries, HEADS, WIDTH), *[(BATCH, keys, kv_heads, WIDTH)] * 2, (BATCH, queries, HEADS, WIDTH)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return [*arrays, jnp.asarray(rng.normal(size=(bias_rows, HEADS, queries, keys)), jnp.float32) if bias_rows else None]


def visibility(case):
    """bool [B, T, S] from the words of the contract, one pair at a time."""
    mask, queries, keys, *_ = CASES[case]
    seen = np.zeros((BATCH, queries, keys), bool)
    own = mask.segments_BT if mask.segments_BT is not None else np.ones((BATCH, queries))
    others = mask.key_segments_BS
    if others is None:
        others = own if mask.segments_BT is not None else np.ones((BATCH, keys))
    branch = mask.branches_BT if mask.branches_BT is not None else np.zeros((BATCH, queries))
    key_branch = mask.key_branches_BS if mask.key_branches_BS is not None else branch
    if mask.branches_BT is None:
        key_branch = np.zeros((BATCH, keys))
    for b, t, s in np.ndindex(seen.shape):
        slot = t + keys - queries
        early = not mask.causal or s <= slot
        near = not mask.window_tokens or slot - s < mask.window_tokens
        prefix = mask.prefix_BS is not None and mask.prefix_BS[b, s]
        reached = key_branch[b, s] in (0, branch[b, t])
        seen[b, t, s] = own[b, t] == others[b, s] and reached and (prefix or (early and near))
    return seen


def oracle(q, k, v, dout, bias, seen, scale=None, kept=None):
    """(out, (dq, dk, dv, dbias)) in float64: Vaswani et al. 2017, eq. 1, and its derivative, a query and head at a time.

    kept [B, T, H, S]: what dropout multiplies the probabilities with.
    """
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    bias = np.zeros((1, q.shape[2], q.shape[1], k.shape[1])) if bias is None else np.asarray(bias, np.float64)
    scale = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    out, dq, dk, dv, dbias = (np.zeros_like(x) for x in (q, q, k, v, bias))
    for b, t, h in np.ndindex(q.shape[:3]):
        g, x, keys = h // (q.shape[2] // k.shape[2]), b % len(bias), np.flatnonzero(seen[b, t])
        if not keys.size:
            continue
        scores = k[b, keys, g] @ q[b, t, h] * scale + bias[x, h, t, keys]
        p = np.exp(scores - scores.max())
        p /= p.sum()
        factor = np.ones_like(p) if kept is None else kept[b, t, h, keys]
        out[b, t, h] = (p * factor) @ v[b, keys, g]
        dv[b, keys, g] += np.outer(p * factor, dout[b, t, h])
        dp = v[b, keys, g] @ dout[b, t, h] * factor
        dscores = p * (dp - p @ dp)
        dbias[x, h, t, keys] += dscores
        dq[b, t, h] = dscores @ k[b, keys, g] * scale
        dk[b, keys, g] += np.outer(dscores, q[b, t, h]) * scale
    return out, (dq, dk, dv, dbias)


def make_run(name, case, **options):
    """run(arrays) -> (out, gradients), compiled once. The mask is an argument: its switches must stay static."""
    mask, _, _, _, _, scale = CASES[case]
    backend = KERNELS[name]

    @jax.jit
    def run(mask, q, k, v, dout, bias):
        def attend(q, k, v, bias):
            return backend(q, k, v, mask, bias_XHTS=bias, scale=scale, block_tokens=BLOCK, **options)

        out, vjp = jax.vjp(attend, q, k, v, bias)
        return out, vjp(dout)

    return lambda arrays: run(mask, *arrays)


def assert_near(actual, expected, tolerance):
    """Absolute, of values of about 1; relative to the largest where sums made it larger."""
    for a, b in zip(actual, expected, strict=False):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize(("name", "case"), MATRIX)
def test_backend_equals_the_oracle_and_keeps_hidden_things_hidden(name, case):
    run, arrays, seen = make_run(name, case), make_arrays(case), visibility(case)
    q, k, v, dout, bias = arrays
    out, gradients = run(arrays)
    assert out.dtype == q.dtype
    expected, slopes = oracle(*arrays, seen, CASES[case][5])
    assert_near([out, *gradients[:3]], [expected, *slopes[:3]], 2e-6)
    if bias is not None:
        assert_near(gradients[3:], slopes[3:], 2e-6)
    blind = ~seen.any(-1)
    assert blind.any() == (case == "cross")
    assert np.all(np.asarray(out)[blind] == 0) and np.all(np.asarray(gradients[0])[blind] == 0)

    junk = [np.asarray(x) for x in make_arrays(case, seed=1)[:3]]
    for t in (0, 10, q.shape[1] - 1):
        other, hidden = np.arange(q.shape[1]) != t, ~seen[:, t]
        where = (other[None, :, None, None], hidden[:, :, None, None], hidden[:, :, None, None])
        changed = [jnp.where(w, 50 * b, a) for w, a, b in zip(where, arrays, junk, strict=False)]
        lone = np.where(where[0], np.float32(0), dout)
        replaced, (dq, dk, dv, _) = run([*changed, lone, bias])
        np.testing.assert_array_equal(replaced[:, t], out[:, t])
        assert np.all(np.asarray(dq)[:, other] == 0)
        assert np.all(np.asarray(dk)[hidden] == 0) and np.all(np.asarray(dv)[hidden] == 0)


def test_oracle_gradients_are_the_slopes_of_its_result():
    *arrays, dout, bias = make_arrays("all_with_one_bias")
    seen, direction = visibility("all_with_one_bias"), make_arrays("all_with_one_bias", seed=2)

    def side(step):
        moved = [np.asarray(x, np.float64) + step * np.asarray(d, np.float64) for x, d in zip(arrays, direction, strict=False)]
        moved_bias = np.asarray(bias, np.float64) + step * np.asarray(direction[4], np.float64)
        return np.sum(np.asarray(dout, np.float64) * oracle(*moved, dout, moved_bias, seen, 1.0)[0])

    gradients = oracle(*arrays, dout, bias, seen, 1.0)[1]
    slope = sum(np.sum(g * np.asarray(d)) for g, d in zip(gradients, [*direction[:3], direction[4]], strict=True))
    # Central difference in float64: its own error is about 1e-9.
    np.testing.assert_allclose(slope, (side(1e-5) - side(-1e-5)) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize("name", [*BACKENDS, "splash"])
def test_bfloat16_is_as_near_as_its_rounding(name):
    arrays, seen = make_arrays("packed_window", dtype=jnp.bfloat16), visibility("packed_window")
    out, gradients = make_run(name, "packed_window")(arrays)
    expected, slopes = oracle(*arrays, seen)
    assert [x.dtype for x in (out, *gradients[:3])] == [jnp.bfloat16] * 4
    # 2^-8 of rounding in q, probabilities and results; a few of them add up.
    assert_near([out, *gradients[:3]], [expected, *slopes[:3]], 2e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_scores_are_summed_in_float32(name):
    # q k = 256 + 1 in 2 x 128 + 1 parts: bfloat16 sums would lose the 1 and the two keys would tie.
    width = 257
    q = jnp.ones((1, 2, 1, width), jnp.bfloat16)
    k = jnp.stack([jnp.ones(width).at[-1].set(0), jnp.ones(width)])[None, :, None].astype(jnp.bfloat16)
    v = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, width))
    out = attention.attend(q, k, v.astype(jnp.bfloat16), Mask(causal=True), implementation=name)
    expected = 1 / (1 + np.exp(-1 / np.sqrt(width)))
    assert abs(float(out[0, 1, 0, 0]) - expected) < 2**-8 * expected < abs(0.5 - expected)


@pytest.mark.parametrize("name", ["plain", "blocked", "flash"])
def test_dropout_scales_what_it_keeps_and_draws_independently(name):
    tokens, frac, rows = 24, 0.25, 64
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(rows, tokens, heads, tokens)), jnp.float32) for heads in (6, 2))
    # v is one-hot in its position, so the output shows the probabilities themselves.
    v = jnp.broadcast_to(jnp.eye(tokens)[None, :, None], k.shape)
    backend = partial(KERNELS[name], mask=Mask(causal=True), block_tokens=16)
    full = np.asarray(jax.jit(backend)(q, k, v))
    dropping = jax.jit(partial(backend, dropout_frac=frac))
    first, second = (np.asarray(dropping(q, k, v, rng=jax.random.key(seed))) for seed in (0, 1))
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


def test_flash_differentiates_the_dropout_that_it_drew():
    rng, frac = jax.random.key(3), 0.3
    q, k, v, dout, bias = make_arrays("packed_window")
    mask, seen = CASES["packed_window"][0], visibility("packed_window")
    # With equal scores and one-hot values in a width of its own, the result shows what was kept.
    shown = jnp.broadcast_to(jnp.eye(LONG)[None, :, None], (BATCH, LONG, 2, LONG))
    blank = jnp.zeros((BATCH, LONG, HEADS, LONG))
    out = jax.jit(partial(KERNELS["flash"], rng=rng, dropout_frac=frac, block_tokens=BLOCK))(blank, shown, shown, mask)
    kept = (np.asarray(out) != 0) / (1 - frac)
    assert kept[:, 5].any() and not np.array_equal(kept[0], kept[1])
    out, gradients = make_run("flash", "packed_window", rng=rng, dropout_frac=frac)((q, k, v, dout, bias))
    expected, slopes = oracle(q, k, v, dout, bias, seen, kept=kept)
    assert_near([out, *gradients[:3]], [expected, *slopes[:3]], 2e-6)


@pytest.mark.parametrize("width", [32, 64, 96])
def test_splash_is_accepted_by_the_compiler_for_tpus(width):
    # Interpreted, a kernel may do what a TPU cannot; lowering for one checks shapes and blocks, without a TPU.
    def vjp(q, k, v, segments):
        return jax.vjp(lambda q, k, v: splash.attend(q, k, v, Mask(causal=True, segments_BT=segments)), q, k, v)[1](q)

    shapes = [jax.ShapeDtypeStruct((1, 300, heads, width), jnp.bfloat16) for heads in (4, 2, 2)]
    lowered = jax.jit(vjp).trace(*shapes, jax.ShapeDtypeStruct((1, 300), jnp.int32)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3  # result, d q, d k with d v


def test_flash_memory_grows_with_the_length_and_its_program_not_at_all():
    def compile_gradient(tokens):
        def loss(q, k, v):
            return KERNELS["flash"](q, k, v, Mask(causal=True)).sum()

        shapes = [jax.ShapeDtypeStruct((1, tokens, heads, 16), jnp.float32) for heads in (4, 2, 2)]
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()

    programs = [compile_gradient(tokens) for tokens in (1024, 2048)]
    short, long = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert long < 4 * 4 * 2048 * 2048 / 16
    assert long < 2.2 * short
    short, long = (len(program.as_text().splitlines()) for program in programs)
    assert abs(long - short) < 0.02 * short


@pytest.fixture
def lines(monkeypatch):
    """What the log says of fallbacks."""
    lines = []
    fallback.explain.cache_clear()
    monkeypatch.setattr(fallback.logging, "warning", lambda text, *words: lines.append(text % words))
    yield lines
    fallback.explain.cache_clear()


def test_what_a_backend_cannot_do_is_done_by_blocked_and_logged_once(lines, monkeypatch):
    q, k, v, _, bias = make_arrays("bidirectional_bias")
    dropout = {"rng": jax.random.key(0), "dropout_frac": 0.5}

    def trace(attend, *arguments, **options):
        return str(jax.make_jaxpr(partial(attend, **options))(q, k, v, *arguments))

    def both(name, mask, **options):
        expected = trace(blocked.attend, mask, **options)
        for _ in range(2):
            assert trace(attention.attend, mask, implementation=name, **options) == expected

    both("dot_product", Mask(), **dropout)
    both("splash", Mask())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    both("splash", Mask(), bias_XHTS=bias)
    both("splash", Mask(), **dropout)
    both("splash", Mask(causal=True, prefix_BS=PREFIX))
    both("splash", Mask(causal=True, branches_BT=FORKED))
    q = q[:, 8:]
    both("splash", Mask(causal=True, window_tokens=3))
    assert lines == [
        "attention: blocked runs instead of dot_product: it has no dropout.",
        "attention: blocked runs instead of splash: it needs a TPU and this is a cpu.",
        "attention: blocked runs instead of splash: it has no bias.",
        "attention: blocked runs instead of splash: it has no dropout.",
        "attention: blocked runs instead of splash: it has no prefix.",
        "attention: blocked runs instead of splash: it has no branches.",
        "attention: blocked runs instead of splash: it has no window over 13 queries and 21 keys.",
    ]


def test_a_gpu_whose_kernel_cannot_take_the_arrays_says_why(lines, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    trace = partial(jax.eval_shape, partial(attention.attend, implementation="dot_product"))
    q, k, v, *_ = make_arrays("window_padding")
    mask = CASES["window_padding"][0]
    trace(q, k, v, mask)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    trace(q, k, v, mask)
    trace(q[..., :7], k[..., :7], v[..., :7], mask)
    assert lines == [
        "attention: XLA runs instead of dot_product by cuDNN: cuDNN takes float16 and bfloat16, not float32.",
        "attention: XLA runs instead of dot_product by cuDNN: cuDNN takes even lengths with a mask or bias, not 21 and 21.",
        "attention: XLA runs instead of dot_product by cuDNN: cuDNN takes head widths up to 128 that are multiples of 8, not 7.",
    ]


def test_shapes_and_names_that_do_not_fit_are_named():
    q, k, v, *_ = make_arrays("causal")
    refused = [
        (Mask(), {"implementation": "flesh"}, "unknown attention 'flesh'. Did you mean 'flash'\\?\n  Accepted: blocked, "),
        (Mask(key_segments_BS=PACKED), {}, "key_segments_BS without segments_BT.\n  Accepted: both"),
        (Mask(segments_BT=PACKED[:, 1:]), {}, r"segments_BT has shape \[2, 20\]; .*\n  Accepted: \[2, 21\]."),
        (Mask(key_branches_BS=FORKED), {}, "key_branches_BS without branches_BT.\n  Accepted: branches of queries and keys"),
        (
            Mask(True, 0, PACKED, PACKED, branches_BT=FORKED),
            {},
            "branches_BT without key_branches_BS, but with key_segments_BS.\n  Accepted: ",
        ),
        (Mask(branches_BT=FORKED), {}, "branches_BT with attention that is not causal.\n  Accepted: causal attention without"),
        (
            Mask(True, 4, branches_BT=FORKED),
            {},
            "branches_BT with window_tokens = 4.\n  Accepted: causal attention without a window",
        ),
        (Mask(True, branches_BT=FORKED[:, 1:]), {}, r"branches_BT has shape \[2, 20\]; .*\n  Accepted: \[2, 21\]."),
        (Mask(window_tokens=-1), {}, "window_tokens = -1.\n  Accepted: 1 or more"),
        (Mask(), {"bias_XHTS": jnp.zeros((1, 1, LONG, LONG))}, r"\n  Accepted: \[1, 4, 21, 21\] or \[2, 4, 21, 21\]."),
    ]
    for mask, options, message in refused:
        with pytest.raises(ValueError, match=message):
            attention.attend(q, k, v, mask, **options)
    with pytest.raises(ValueError, match=r"3 key/value heads do not divide 4 query heads.\n  Accepted: 1, 2, 4."):
        attention.attend(q, k[:, :, [0, 0, 0]], v[:, :, [0, 0, 0]], Mask())
    with pytest.raises(ValueError, match="21 queries but 20 keys in causal attention"):
        attention.attend(q, k[:, 1:], v[:, 1:], Mask(causal=True))
    with pytest.raises(ValueError, match=r"v has shape \[2, 20, 2, 8\]"):
        attention.attend(q, k, v[:, 1:], Mask())
