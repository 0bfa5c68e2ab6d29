"""Attention on data 2 x fsdp 2 x tensor 2 devices: the numbers of one device, by devices that need not talk about it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxllm import registry
from jaxllm.config import base
from jaxllm.ops import attention
from jaxllm.ops.attention import Backend, Mask, blocked, splash
from jaxllm.parallel import plan, rules

BATCH, LONG, SHORT, HEADS, KV_HEADS, WIDTH = 4, 21, 13, 4, 2, 8
# But those of devices that are alone in their group: shard_map sums over axes of size 1 too.
ALONE = r"(\{\{0\},|mesh\[.*\] \{'(pipe|seq)'(,'(pipe|seq)')*\})"
COLLECTIVES = re.compile(rf" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\((?!.*replica_groups={ALONE})")
INTERPRETED = splash.BACKEND._replace(attend=partial(splash.attend, interpret=True), refuse=lambda *_: None)
# Documents and padding, different in each row.
SEGMENTS = np.stack([np.repeat([1, 2, 0], [first, 17 - first, 4]) for first in (3, 8, 11, 16)]).astype(np.int32)
SOURCE = np.stack([np.repeat([2, 1, 0], [first, 11 - first, 2]) for first in (2, 5, 7, 9)]).astype(np.int32)

CASES = {
    "packed_window": (Mask(causal=True, window_tokens=5, segments_BT=SEGMENTS), LONG),
    "padding": (Mask(segments_BT=SEGMENTS), LONG),
    "cross": (Mask(segments_BT=SEGMENTS, key_segments_BS=SOURCE), SHORT),
}
ONE_BIAS, A_BIAS_A_ROW = 1, BATCH


def spread(**sizes):
    """The plan of a mesh with these sizes."""
    shape = [sizes.get(axis, 1) for axis in rules.MESH_AXES]
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    return plan.Plan(mesh, rules.Tables(rules.RULES, rules.RULES), base().parallel)


EIGHT = spread(data=2, fsdp=2, tensor=2)


def draw(keys, bias_rows):
    """[q, k, v, d out, bias or None] and their logical axes."""
    rng, heads, kv_heads = np.random.default_rng(0), ("heads", HEADS), ("kv_heads", KV_HEADS)
    sizes = [(LONG, heads), (keys, kv_heads), (keys, kv_heads), (LONG, heads)]
    arrays = [rng.normal(size=(BATCH, tokens, count, WIDTH)).astype(np.float32) for tokens, (_, count) in sizes]
    axes = [("batch", "length", axis, "head_dim") for _, (axis, _) in sizes]
    bias = rng.normal(size=(bias_rows, HEADS, LONG, keys)).astype(np.float32) if bias_rows else None
    return [*arrays, bias], [*axes, (None if bias_rows == ONE_BIAS else "batch", "heads", None, None)]


def differentiate(name, constrain, mask, q, k, v, dout, bias):
    """(out, gradients of q, k, v and bias)."""
    attend = partial(attention.attend, implementation=name, block_tokens=8, constrain=constrain)
    out, vjp = jax.vjp(lambda q, k, v, bias: attend(q, k, v, mask, bias_XHTS=bias), q, k, v, bias)
    return out, vjp(dout)


BACKENDS = [(name, "packed_window", ONE_BIAS) for name in registry.names("attention") if name != "splash"]


@pytest.mark.parametrize(
    ("name", "case", "bias_rows"),
    [*BACKENDS, *[("splash", case, 0) for case in CASES], ("kernel", "cross", ONE_BIAS), ("kernel", "padding", A_BIAS_A_ROW)],
)
def test_eight_devices_give_what_one_gives_and_need_not_talk(name, case, bias_rows, monkeypatch):
    """`kernel` stands for one with a bias that the compiler cannot share out. Only the gradient of a bias that rows share is summed."""
    monkeypatch.setattr(splash, "BACKEND", INTERPRETED if name == "splash" else Backend(blocked.attend, per_device=True))
    mask, keys = CASES[case]
    arrays, axes = draw(keys, bias_rows)
    expected = jax.jit(partial(differentiate, "plain", EIGHT.constrain))(mask, *arrays)
    placed = [None if x is None else jax.device_put(x, EIGHT.sharding(a, x.shape, "")) for x, a in zip(arrays, axes, strict=True)]
    out_shardings = (placed[0].sharding, tuple(None if x is None else x.sharding for x in (*placed[:3], placed[4])))
    run = jax.jit(partial(differentiate, "splash" if name == "kernel" else name, EIGHT.constrain), out_shardings=out_shardings)
    compiled = run.lower(jax.device_put(mask, EIGHT.batch_sharding()), *placed).compile()
    assert [found[1] for found in COLLECTIVES.finditer(compiled.as_text())] == (["all-reduce"] if bias_rows == ONE_BIAS else [])
    found = compiled(jax.device_put(mask, EIGHT.batch_sharding()), *placed)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-6)


def test_each_device_drops_others(monkeypatch):
    monkeypatch.setattr(splash, "BACKEND", Backend(blocked.attend, per_device=True))
    rng, frac = jax.random.key(0), 0.5
    # Equal scores and one-hot values: the result shows which probabilities were kept.
    q, k = jnp.zeros((BATCH, SHORT, HEADS, SHORT)), jnp.zeros((BATCH, SHORT, KV_HEADS, SHORT))
    v = jnp.broadcast_to(jnp.eye(SHORT)[:, None], k.shape)
    attend = partial(attention.attend, implementation="splash", rng=rng, dropout_frac=frac, constrain=EIGHT.constrain)
    kept = np.asarray(jax.jit(attend)(q, k, v, Mask())) != 0
    assert abs(kept.mean() - frac) < 0.05  # 2704 draws: a standard deviation is 0.01
    draws = kept.transpose(0, 2, 1, 3).reshape(BATCH * HEADS, -1)
    agree = (draws[:, None] == draws).mean(-1)
    assert np.abs(agree - 0.5)[~np.eye(len(agree), dtype=bool)].max() < 0.2  # 169 draws a pair: a standard deviation is 0.04


def test_splash_on_a_mesh_is_accepted_by_the_compiler_for_tpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays, axes = draw(LONG, 0)
    mask = Mask(causal=True, segments_BT=jax.device_put(SEGMENTS, EIGHT.batch_sharding()))
    placed = [jax.device_put(x, EIGHT.sharding(a, x.shape, "")) for x, a in zip(arrays[:4], axes, strict=False)]
    traced = jax.jit(partial(differentiate, "splash", EIGHT.constrain, bias=None)).trace(mask, *placed)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 3  # result, d q, d k with d v
    # Of the two query heads and the key/value head of a device.
    assert all("tensor<2x128x64xf32>, tensor<128x64xf32>, tensor<128x64xf32>" in line for line in calls)


def test_rows_that_the_mesh_cuts_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(splash, "BACKEND", INTERPRETED)
    said = []
    monkeypatch.setattr(attention, "explain", lambda *words: said.append(words))
    constrain = spread(data=2, seq=2).constrain
    shapes = [jax.ShapeDtypeStruct((BATCH, 16, heads, WIDTH), jnp.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    jax.eval_shape(partial(attention.attend, mask=Mask(causal=True), implementation="splash", constrain=constrain), *shapes)
    assert said == [("splash", "blocked", "it needs whole rows, and the mesh cuts them into 2 parts")]
