"""The train step on small language models: accumulation, meshes, both forms of the stack, precisions, and its compilation."""

import re
from functools import partial

import jax
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.engine import state as states
from jaxllm.engine import step as steps
from jaxllm.ops.attention import splash
from jaxllm.transforms import tree

pytestmark = pytest.mark.usefixtures("compiled_anew")
MESH = {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2}


def trained(batches, **overrides):
    """(initial parameters, state, metrics of each step) after training on these batches."""
    training, step = tiny.make(**overrides), tiny.compiled(**overrides)
    state = training.create()
    initial, rows = jax.device_get(state.params), []
    for batch in batches:
        state, metrics = step(state, training.place(batch))
        rows.append(jax.device_get(metrics))
    return initial, state, rows


def assert_trees_close(found, expected, atol):
    """Each array within `atol` of the largest entry of the expected one."""
    for (name, a), (_, b) in zip(tree.named_leaves(found), tree.named_leaves(expected), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=atol, err_msg=name)


def moments(state):
    """Adam's first moments: the gradients, summed over steps."""
    return [leaf for name, leaf in tree.named_leaves(tree.stack_layers(state.opt_state)) if "mu/" in name]


@pytest.fixture(scope="module")
def one_step():
    return trained([tiny.batch()])


def test_accumulation_is_exact_for_unequal_rows(one_step):
    """Eight micro-batches of one row, of different weight, one of them fully masked, against one batch of eight rows."""
    _, whole, (expected,) = one_step
    _, parts, (found,) = trained([tiny.batch()], train__microbatches=8)
    assert tiny.batch()["weights"][3].sum() == 0
    assert len({*tiny.batch()["weights"].sum(1).tolist()}) > 3
    for name in ("loss", "grad_norm", "weight", "accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)
    assert_trees_close(moments(parts), moments(whole), 2e-6)


@pytest.mark.parametrize(
    "options", [{"train__microbatches": 2}, {"model__attention": "splash", "model__layers_as": "scan", "model__remat": "full"}]
)
def test_eight_devices_equal_one(one_step, options, monkeypatch):
    """data 2 x fsdp 2 x tensor 2, with two micro-batches, or with a kernel (interpreted) that only runs on each device alone."""
    interpreted = splash.BACKEND._replace(attend=partial(splash.attend, interpret=True), refuse=lambda *_: None)
    monkeypatch.setattr(splash, "BACKEND", interpreted)
    _, one, (expected,) = one_step
    _, eight, (found,) = trained([tiny.batch()], **options, **MESH)
    for name in ("loss", "grad_norm", "weight", "accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    assert_trees_close(moments(eight), moments(one), 1e-5)
    for a, b in zip(jax.tree.leaves(tree.stack_layers(eight.params)), jax.tree.leaves(tree.stack_layers(one.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_microbatches_keep_rows_on_their_device():
    """No integer array (tokens, targets, segments, positions) travels between devices to be split into micro-batches."""
    text = tiny.compiled(train__microbatches=2, **MESH).executable.as_text()
    moves = re.findall(r"= \(?(\S+?)\[.* (all-gather|all-to-all|collective-permute)\(", text)
    assert ("f32", "all-gather") in moves  # parameters do travel
    assert not [move for move in moves if move[0] == "s32"]


def test_scan_trains_as_unrolled():
    batches = [tiny.batch(seed) for seed in range(3)]
    initial, unrolled, expected = trained(batches, model__layers=2)
    scan_initial, scan, found = trained(batches, model__layers=2, model__layers_as="scan")
    for a, b in zip(jax.tree.leaves(tree.stack_layers(initial)), jax.tree.leaves(scan_initial), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-6)
    np.testing.assert_allclose([row["grad_norm"] for row in found], [row["grad_norm"] for row in expected], rtol=1e-5)
    assert_trees_close(moments(scan), moments(unrolled), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_a_batch_can_be_learned_by_heart(family):
    """One document a row, each with a first token of its own: nothing but its start tells a row from the others."""
    batch = tiny.batch()
    batch["tokens"][:, 0] = np.arange(tiny.ROWS)
    batch |= {"segments": np.ones_like(batch["segments"]), "weights": np.ones_like(batch["weights"])}
    batch["positions"][:] = np.arange(tiny.LENGTH)
    _, _, rows = trained([batch] * 150, model__layers=2, model__name=family, model__init_std=0.02)
    assert abs(rows[0]["loss"] - np.log(tiny.VOCAB)) < 0.1
    assert rows[-1]["loss"] < 0.01
    assert rows[-1]["accuracy"] == 1
    assert rows[0]["moved"].all()


def test_bfloat16_computes_but_does_not_keep(one_step):
    """Norm scales start at 1 and move by 3e-3, less than half a bfloat16 step there (2^-8): only float32 masters can hold that."""
    initial, state, (found,) = trained([tiny.batch()], precision__compute="bfloat16")
    _, _, (expected,) = one_step
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-2)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=5e-2)
    assert found["loss"] != expected["loss"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))} == {"float32", "int32"}
    change = np.abs(np.asarray(state.params["norm"]["scale"]) - initial["norm"]["scale"])
    np.testing.assert_allclose(change, 3e-3, rtol=1e-2)


def test_float16_training_follows_float32(one_step):
    _, _, (expected,) = one_step
    initial, state, (found,) = trained([tiny.batch()], precision__compute="float16")
    assert found["finite"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))} == {"float32", "int32"}


@pytest.mark.parametrize("transforms", [(), ("lora",)])
def test_the_step_is_compiled_once_and_reuses_its_buffers(transforms):
    """From an empty start: one compilation to make the state, one for the step, none while training. (Warnings, such as the one of
    donated buffers that cannot be used, are errors.)"""
    compilations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    training = tiny.make(train__ema_decay=0.5, model__width=16, train__transforms=transforms)
    plan, config = training.plan, training.config
    batches = [training.place(tiny.batch(seed)) for seed in range(3)]
    key = states.random_key(config.seed, "init")  # compiles its own tiny programs
    jax.block_until_ready(key)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state = training.create()
        step = steps.compile(training.step, training.abstract(), steps.abstract_batch(config, plan))
        assert len(compilations) == 2
        for batch in batches:
            old = jax.tree.leaves(state)
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            assert all(leaf.is_deleted() for leaf in old)
        assert len(compilations) == 2
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_compilers_figures_add_up():
    step, training = tiny.compiled(), tiny.make()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(training.abstract()))
    batch = sum(array.nbytes for array in tiny.batch().values())
    assert held + batch <= step.argument_bytes <= held + batch + 4096
    assert step.peak_bytes < step.argument_bytes + step.temp_bytes + 4096  # the new state is written over the old one
    assert step.compile_secs > 0
    # 6 flops a parameter and token is the floor (the embedding is looked up, not multiplied; the head is another such matrix).
    parameters = sum(leaf.size for leaf in jax.tree.leaves(training.abstract().params)) - tiny.VOCAB * 32
    assert 4 * parameters * tiny.ROWS * tiny.LENGTH < step.flops < 20 * parameters * tiny.ROWS * tiny.LENGTH
