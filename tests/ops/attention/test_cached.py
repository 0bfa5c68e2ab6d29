"""Attention over a cache against the loop of test_attention: slots up to a position, window, bias, leftovers."""

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


@pytest.mark.parametrize(("window", "biased", "scale"), [(0, False, None), (4, True, 1.0)])
def test_sees_the_slots_up_to_its_position_whatever_the_others_hold(window, biased, scale):
    q, k, v, bias = make_arrays()
    run = jax.jit(lambda q, k, v, p, b: attention.cached(q, k, v, p, window_tokens=window, bias_XHTS=b, scale=scale))
    out = run(q, k, v, POSITIONS, bias if biased else None)
    expected = oracle(q, k, v, bias if biased else bias * 0, window, scale or WIDTH**-0.5)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    assert np.all(np.asarray(out)[0, 4] == 0)  # a query at no position
    # What lies in later slots (a longer row's keys, an earlier request) changes no bit.
    junk = (np.arange(SLOTS) > POSITIONS.max(1)[:, None])[:, :, None, None]
    changed = run(q, jnp.where(junk, 1e4, k), jnp.where(junk, 1e4, v), POSITIONS, bias if biased else None)
    np.testing.assert_array_equal(changed, out)
    one = run(q[:, 2:3], k, v, POSITIONS[:, 2:3], bias[:, :, 2:3] if biased else None)
    np.testing.assert_allclose(one, out[:, 2:3], rtol=0, atol=1e-6)
