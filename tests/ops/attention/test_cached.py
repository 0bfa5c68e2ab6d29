"""Attention over a cache against the loop of test_attention: slots up to a position, window, bias, leftovers, blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import attention

QUERIES, SLOTS, HEADS, KV_HEADS, WIDTH = 5, 11, 6, 2, 8
POSITIONS = np.array([[0, 1, 2, 3, -1], [6, 7, 8, 9, 10]])


def make_arrays():
    rng = np.random.default_rng(0)
    shapes = [(2, QUERIES, HEADS, WIDTH), (2, SLOTS, KV_HEADS, WIDTH), (2, SLOTS, KV_HEADS, WIDTH), (2, HEADS, QUERIES, SLOTS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def oracle(q, k, v, bias, window, scale):
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        last = POSITIONS[b, t]
        slots = np.arange(max(0, last - window + 1) if window else 0, last + 1)
        if slots.size:
            p = np.exp(k[b, slots, h // 3] @ q[b, t, h] * scale + bias[b, h, t, slots])
            out[b, t, h] = p / p.sum() @ v[b, slots, h // 3]
    return out


def run(q, k, v, positions, bias, **options):
    """Compiled, from arrays."""

    def cached(q, k, v, positions, bias):
        read = lambda start, count: (cut(k, start, count), cut(v, start, count))  # noqa: E731
        return attention.cached(q, read, SLOTS, positions, bias_XHTS=bias, **options)

    def cut(x_BSGK, start, count):
        return jax.lax.dynamic_slice_in_dim(x_BSGK, start, count, axis=1).swapaxes(1, 2)

    return np.asarray(jax.jit(cached)(q, k, v, positions, bias))


# One block; two queries and slots at once, so that the last slots are read with some before them; a slot at a time.
@pytest.mark.parametrize("block", [None, 2, 1])
@pytest.mark.parametrize(("window", "biased", "scale"), [(0, False, None), (4, True, 1.0)])
def test_sees_the_slots_up_to_its_position_whatever_the_others_hold(window, biased, scale, block):
    q, k, v, bias = make_arrays()
    given, options = bias if biased else None, {"window_tokens": window, "scale": scale, "block_tokens": block}
    out = run(q, k, v, POSITIONS, given, **options)
    expected = oracle(q, k, v, bias if biased else bias * 0, window, scale or WIDTH**-0.5)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    assert np.all(out[0, 4] == 0)  # a query at no position
    # What lies in later slots (a longer row's keys, an earlier request) changes no bit, nor does how far other rows are.
    junk = (np.arange(SLOTS) > POSITIONS.max(1)[:, None])[:, :, None, None]
    np.testing.assert_array_equal(run(q, jnp.where(junk, 1e4, k), jnp.where(junk, 1e4, v), POSITIONS, given, **options), out)
    elsewhere = run(q, k, v, np.array([POSITIONS[0], POSITIONS[1] - 6]), given, **options)
    np.testing.assert_array_equal(elsewhere[0], out[0])
    one = run(q[:, 2:3], k, v, POSITIONS[:, 2:3], given if given is None else given[:, :, 2:3], **options)
    np.testing.assert_allclose(one, out[:, 2:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("window", "read"), [(0, [0, 2, 4]), (3, [2, 4])])
def test_reads_no_block_that_no_query_sees(window, read):
    """One query at position 5, in blocks of 2: blocks 0 to 2, or, with a window, those that hold slots 3 to 5."""
    q, k, v, _ = make_arrays()
    starts = []

    def watch(start, count):
        jax.debug.callback(lambda start: starts.append(int(start)), start, ordered=True)
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, count, axis=1).swapaxes(1, 2) for x in (k[:1], v[:1]))

    jax.block_until_ready(attention.cached(q[:1, :1], watch, SLOTS, jnp.array([[5]]), window_tokens=window, block_tokens=2))
    jax.effects_barrier()
    assert starts == read
