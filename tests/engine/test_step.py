"""The train step: its rules on a linear regression whose every number NumPy knows, and its numerics on small language models."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.engine import state as states
from jaxllm.engine import step as steps
from jaxllm.optim import build
from jaxllm.parallel import plan as plans
from jaxllm.transforms import tree
from jaxllm.types import Mean, Model

LR, B1 = 0.1, 0.9
WIDTH, EXAMPLES = 3, 8
MESH = {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2}


# ---------------------------------------------------------------- a linear regression


def regression_batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((EXAMPLES, WIDTH)).astype(np.float32)
    weights = rng.choice([0.5, 1.0, 2.0], (EXAMPLES, 1)).astype(np.float32)
    weights[3] = 0
    return {"x": x, "y": rng.standard_normal((EXAMPLES, 1)).astype(np.float32), "weights": weights}


def squared_error(params, batch, rng):
    """Sum of w (x . kernel + bias - y)^2; reports a random number where dropout is on."""
    error = batch["x"] @ params["kernel"][:, None] + params["bias"] - batch["y"]
    weight = jnp.sum(batch["weights"])
    mean = Mean(jnp.sum(batch["weights"] * error**2), weight)
    noise = {} if rng is None else {"noise": Mean(jax.random.uniform(rng), jnp.ones(()))}
    return mean, {"loss": mean, **noise}


def regression(dtype=jnp.float32, objective=squared_error, **overrides):
    """(config, compiled step, fresh state, place) of the regression; `dead` is a parameter that nothing depends on."""
    config = tiny.config_of({"optimizer.weight_decay": 0.0, "optimizer.groups": ()} | overrides)
    plan = plans.make(config, jax.devices()[:1])
    shapes = {"kernel": (WIDTH,), "bias": (1,), "dead": (2,)}
    axes = dict.fromkeys(shapes, ("head_dim",))

    def init(rng):
        return {name: jax.random.normal(jax.random.fold_in(rng, len(name)), shape) for name, shape in shapes.items()}

    model = Model("regression", None, axes, init, None, None, None, None, None)
    optimizer = build.make(config, axes)
    step = steps.make(objective, optimizer, lambda n: jnp.float32(LR), config)
    abstract = states.abstract(model, optimizer, config, plan)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=plan.batch_sharding()), regression_batch())
    executable = steps.compile(step, abstract, like)

    def place(batch):
        return jax.device_put(batch, plan.batch_sharding())

    return executable, lambda: states.create(model, optimizer, config, plan), place


@pytest.fixture(scope="module")
def plain():
    return regression(**{"optimizer.clip_norm": 0.0, "train.ema_decay": 0.75, "train.trainable": "kernel|bias"})


def gradient(params, batch):
    x, y, w = (batch[name].astype(np.float64) for name in ("x", "y", "weights"))
    error = x @ np.float64(params["kernel"])[:, None] + np.float64(params["bias"]) - y
    weight = w.sum()
    return {"kernel": (2 * w * error * x).sum(0) / weight, "bias": (2 * w * error).sum(0) / weight}, (w * error**2).sum() / weight


def momentum(state):
    """Adam's first moment over 1 - b1: after one step the very gradient that went into the optimizer."""
    return {
        name.rpartition("mu/")[2]: np.asarray(leaf) / (1 - B1) for name, leaf in tree.named_leaves(state.opt_state) if "mu/" in name
    }


def snapshot(values):
    return [np.array(leaf) for leaf in jax.tree.leaves(values)]


def norm_of(gradients):
    return np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in gradients.values()))


def test_gradient_loss_and_metrics_equal_numpy(plain):
    step, create, place = plain
    state = create()
    expected, loss = gradient(jax.device_get(state.params), regression_batch())
    state, metrics = step(state, place(regression_batch()))
    for name, value in expected.items():
        np.testing.assert_allclose(momentum(state)[name], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm_of(expected), rtol=1e-6)
    assert metrics["weight"] == regression_batch()["weights"].sum()
    assert metrics["lr"] == np.float32(LR)
    assert (state.step, metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 0, 0)
    assert metrics["finite"]
    assert metrics["moved"].tolist() == [True, True]
    assert "noise" not in metrics


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_change_nothing(plain, microbatches):
    """With 8 each example is a micro-batch of its own, one of weight 0."""
    step, create, place = regression(
        **{"train.microbatches": microbatches, "optimizer.clip_norm": 0.0, "train.trainable": "kernel|bias"}
    )
    one, one_metrics = plain[0](plain[1](), plain[2](regression_batch()))
    many, metrics = step(create(), place(regression_batch()))
    for name in ("loss", "grad_norm", "weight"):
        np.testing.assert_allclose(metrics[name], one_metrics[name], rtol=1e-6)
    for name, value in momentum(one).items():
        np.testing.assert_allclose(momentum(many)[name], value, rtol=1e-6)


def test_clipping_equals_numpy():
    clip = 0.05
    step, create, place = regression(**{"optimizer.clip_norm": clip})
    state = create()
    expected, _ = gradient(jax.device_get(state.params), regression_batch())
    norm = norm_of(expected)
    assert norm > clip
    state, metrics = step(state, place(regression_batch()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)  # before clipping
    for name, value in expected.items():
        np.testing.assert_allclose(momentum(state)[name], value * clip / norm, rtol=1e-5)


def test_a_gradient_within_the_clip_norm_is_left_alone():
    step, create, place = regression(**{"optimizer.clip_norm": 1e3})
    state = create()
    expected, _ = gradient(jax.device_get(state.params), regression_batch())
    state, _ = step(state, place(regression_batch()))
    np.testing.assert_allclose(momentum(state)["kernel"], expected["kernel"], rtol=1e-5)


def test_a_parameter_without_gradient_did_not_move():
    step, create, place = regression()
    state, metrics = step(create(), place(regression_batch()))
    moved = dict(zip(tree.names(state.params), metrics["moved"].tolist(), strict=True))
    assert moved == {"kernel": True, "bias": True, "dead": False}


def test_average_follows_its_closed_form(plain):
    """ema_n = d^n p_0 + (1 - d) sum_i d^(n - i) p_i."""
    step, create, place = plain
    state, decay = create(), 0.75
    history = [np.float64(state.params["kernel"])]
    for seed in range(4):
        state, _ = step(state, place(regression_batch(seed)))
        history.append(np.float64(state.params["kernel"]))
    expected = decay**4 * history[0] + sum((1 - decay) * decay ** (4 - i) * history[i] for i in range(1, 5))
    np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-6)
    assert np.abs(expected - history[-1]).max() > 0.01


def test_frozen_parameters_stay_bit_equal(plain):
    step, create, place = plain
    state = create()
    before = snapshot(state.frozen)
    state, _ = step(state, place(regression_batch()))
    assert len(before) == 1
    np.testing.assert_array_equal(before, snapshot(state.frozen))


@pytest.mark.parametrize("name", ["x", "weights"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_is_skipped_and_counted(plain, name, value):
    step, create, place = plain
    state, _ = step(create(), place(regression_batch()))
    kept = ("params", "opt_state", "ema")
    before = [snapshot(getattr(state, each)) for each in kept]
    bad = regression_batch(1)
    bad[name][0] = value
    if name == "weights":
        bad["y"][0] = 1e25  # a finite weight whose loss overflows
    for count in (1, 2):
        state, metrics = step(state, place(bad))
        assert not metrics["finite"]
        assert (state.step, metrics["skipped"], metrics["skipped_in_a_row"]) == (1 + count, count, count)
    for each, old in zip(kept, before, strict=True):
        for a, b in zip(old, snapshot(getattr(state, each)), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=each)
    state, metrics = step(state, place(regression_batch(1)))
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    assert metrics["finite"]
    assert (np.asarray(state.params["kernel"]) != before[0][1]).all()


def test_a_step_without_weight_changes_nothing_and_says_so(plain):
    step, create, place = plain
    state, _ = step(create(), place(regression_batch()))
    before = snapshot((state.params, state.opt_state, state.ema))
    empty = regression_batch() | {"weights": np.zeros((EXAMPLES, 1), np.float32)}
    state, metrics = step(state, place(empty))
    assert (metrics["weight"], metrics["loss"], metrics["skipped"], state.step) == (0, 0, 0, 2)
    assert metrics["finite"]
    for a, b in zip(before, snapshot((state.params, state.opt_state, state.ema)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_numbers_are_a_function_of_seed_step_and_microbatch():
    seen = {}
    for seed, microbatches in ((0, 1), (1, 1), (0, 2)):
        step, create, place = regression(**{"model.dropout_frac": 0.1, "seed": seed, "train.microbatches": microbatches})
        state = create()
        for index in range(3):
            state, metrics = step(state, place(regression_batch()))
            seen[seed, microbatches, index] = float(metrics["noise"])
        again, metrics = step(replace(state, step=jax.device_put(jnp.int32(1), state.step.sharding)), place(regression_batch()))
        assert float(metrics["noise"]) == seen[seed, microbatches, 1]
    assert len(set(seen.values())) == len(seen)


# ---------------------------------------------------------------- float16


def half_squared_error(params, batch, rng):
    """squared_error whose every array, and so every cotangent, is float16."""
    low = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch["x"], batch["y"]))
    (params, x, y) = low
    error = x @ params["kernel"][:, None] + params["bias"] - y
    weight = jnp.sum(batch["weights"])
    mean = Mean(jnp.sum(batch["weights"] * (error**2).astype(jnp.float32)), weight)
    return mean, {"loss": mean}


@pytest.fixture(scope="module")
def half():
    return regression(
        objective=half_squared_error,
        **{
            "precision.compute": "float16",
            "precision.loss_scale": 2.0**20,
            "precision.loss_scale_growth_steps": 3,
            "train.trainable": "kernel|bias",
            "optimizer.clip_norm": 0.0,
        },
    )


def run_half(half, state, batches):
    step, _, place = half
    rows = []
    for batch in batches:
        state, metrics = step(state, place(batch))
        rows.append({name: value.item() for name, value in metrics.items() if name != "moved"})
    return state, rows


def with_scale(state, scale):
    return replace(state, loss_scale=jax.device_put(states.LossScale(jnp.float32(scale), jnp.int32(0)), state.step.sharding))


def test_loss_scale_halves_until_it_fits_then_doubles(half):
    state, rows = run_half(half, half[1](), [regression_batch()] * 16)
    scales = [row["loss_scale"] for row in rows]
    skipped = rows[-1]["skipped"]
    first = [row["finite"] for row in rows].index(True)
    assert first > 2  # 2^20 overflows float16 (65504) several times
    assert scales[:first] == [2.0 ** (19 - index) for index in range(first)]
    assert scales[first : first + 3] == [scales[first - 1]] * 2 + [2 * scales[first - 1]]
    assert all(row["skipped_in_a_row"] == 0 for row in rows)
    assert skipped == sum(not row["finite"] for row in rows)
    assert skipped >= first
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_scaled_gradient_equals_numpy_within_float16(half):
    state = with_scale(half[1](), 1024.0)
    expected, loss = gradient(jax.device_get(state.params), regression_batch())
    state, (row,) = run_half(half, state, [regression_batch()])
    # 2^-11 relative a rounding, a dozen of them along the way.
    np.testing.assert_allclose(row["loss"], loss, rtol=5e-3)
    np.testing.assert_allclose(row["grad_norm"], norm_of(expected), rtol=5e-3)
    np.testing.assert_allclose(momentum(state)["kernel"], expected["kernel"], rtol=0, atol=5e-3 * norm_of(expected))


def test_small_gradients_survive_only_by_the_scale(half):
    """Residuals of 1e-7 times 1/8 are below the smallest float16, 6e-8, unless scaled."""
    state = half[1]()
    batch = regression_batch()
    params = jax.device_get(state.params)
    batch |= {"x": np.zeros_like(batch["x"]), "weights": np.full_like(batch["weights"], 1e-9)}
    batch["y"][:] = params["bias"].astype(np.float16).astype(np.float32) + 0.5
    norms = {}
    for scale in (1.0, 2.0**12):
        _, (row,) = run_half(half, with_scale(half[1](), scale), [batch])
        norms[scale] = row["grad_norm"]
    assert norms[1.0] == 0
    np.testing.assert_allclose(norms[2.0**12], 8e-9, rtol=5e-2)


def test_below_one_the_data_is_to_blame(half):
    bad = regression_batch()
    bad["x"][0] = np.nan
    state, rows = run_half(half, with_scale(half[1](), 4.0), [bad] * 5)
    assert state.loss_scale.finite_steps == 0
    assert [row["loss_scale"] for row in rows] == [2, 1, 1, 1, 1]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 1, 2, 3]
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- language models


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


def test_eight_devices_equal_one(one_step):
    """data 2 x fsdp 2 x tensor 2, with two micro-batches, against one device with none."""
    _, one, (expected,) = one_step
    _, eight, (found,) = trained([tiny.batch()], train__microbatches=2, **MESH)
    for name in ("loss", "grad_norm", "weight", "accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    assert_trees_close(moments(eight), moments(one), 1e-5)
    for a, b in zip(jax.tree.leaves(eight.params), jax.tree.leaves(one.params), strict=True):
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
    _, _, rows = trained([batch] * 150, model__layers=2, model__name=family)
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


def test_the_step_is_compiled_once_and_reuses_its_buffers():
    """From an empty start: one compilation to make the state, one for the step, none while training. (Warnings, such as the one of
    donated buffers that cannot be used, are errors.)"""
    compilations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    training = tiny.make(train__ema_decay=0.5, model__width=16)
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
