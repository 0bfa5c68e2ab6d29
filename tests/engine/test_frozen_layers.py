"""The first layers of a model stay as they are, cost no optimizer state, no gradient and no backward pass."""

import jax
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.transforms import tree

LAYERS, STEPS = 4, 3
DEEP = {"model__layers": LAYERS, "optimizer__weight_decay": 0.5}


def run(**changes):
    """(parameters before, after some steps, norms of the gradients)."""
    training = tiny.make(**DEEP, **changes)
    state = training.create()
    before = jax.tree.map(np.asarray, tree.combine(state.params, state.frozen))
    norms = []
    for step in range(STEPS):
        state, metrics = tiny.compiled(**DEEP, **changes)(state, training.place(tiny.batch(step)))
        norms.append(float(metrics["grad_norm"]))
    return before, jax.tree.map(np.asarray, tree.combine(state.params, state.frozen)), norms


def moved(before, after):
    """{"embed/tokens": True, "layers/1/attention/q/kernel": False, ...}."""
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): bool((a != b).any()) for (path, a), b in pairs}


@pytest.mark.parametrize("first", [1, 3, LAYERS])
def test_only_what_stands_above_moves(first):
    found = moved(*run(train__frozen_layers=first)[:2])
    for name, changed in found.items():
        parts = name.split("/")
        assert changed == (parts[0] != "embed" and (parts[0] != "layers" or int(parts[1]) >= first)), name


def test_each_stack_of_an_encoder_decoder_has_its_own_first_layers():
    training = tiny.make(
        model__name="t5", model__layers=3, model__decoder_layers=2, train__objective="seq2seq", train__frozen_layers=1
    )
    state = training.create()
    held = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state.params)}
    assert {"/".join(name.split("/")[:3]) for name in held} == {
        "encoder/layers/1",
        "encoder/layers/2",
        "encoder/norm/scale",
        "decoder/layers/1",
        "decoder/norm/scale",
    }


def test_frozen_layers_have_no_state_and_no_average():
    state = tiny.make(**DEEP, train__frozen_layers=3, train__ema_decay=0.5).create()
    for part in (state.params, state.ema, state.opt_state[0].mu):
        assert [len(jax.tree.leaves(layer)) > 0 for layer in part["layers"]] == [False, False, False, True]
        assert not jax.tree.leaves(part["embed"])
    assert [len(jax.tree.leaves(layer)) > 0 for layer in state.frozen["layers"]] == [True, True, True, False]


def test_what_is_trained_gets_the_gradient_that_it_gets_in_a_whole_model():
    """Without moments and clipping one step of lion moves each number by its rate: signs of the gradients tell."""
    options = {"optimizer__name": "lion", "optimizer__weight_decay": 0.0, "optimizer__clip_norm": 0.0, "model__layers": LAYERS}
    results = []
    for first in (0, 2):
        training = tiny.make(**options, train__frozen_layers=first)
        state, _ = tiny.compiled(**options, train__frozen_layers=first)(training.create(), training.place(tiny.batch()))
        results.append(jax.tree.map(np.asarray, state.params))
    whole, part = results
    for layer in (2, 3):
        jax.tree.map(np.testing.assert_array_equal, part["layers"][layer], whole["layers"][layer])


@pytest.mark.parametrize(
    "mesh", [{"parallel__data": 2, "parallel__fsdp": 2}, {"parallel__fsdp": 2, "parallel__tensor": 2, "parallel__zero_stage": 1}]
)
def test_a_mesh_gives_what_one_device_gives(mesh):
    options = {"train__frozen_layers": 2, "train__microbatches": 2}
    (_, one, norms), (_, several, also) = run(**options), run(**options, **mesh)
    np.testing.assert_allclose(also, norms, rtol=1e-5)
    # Adam divides by the root of a gradient's square: where that is next to 0, a rounding turns into a part of a step of 3e-3.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=3e-4), one, several)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_ends_above_them(remat):
    """Of L equal layers each takes 1 in the forward and 2 in the backward pass: with all frozen, two thirds of their work is gone."""
    options = {"model__width": 64, "model__mlp_width": 256, "model__remat": remat, "model__context_tokens": 16}
    flops = {
        (layers, first): tiny.compiled(**options, model__layers=layers, train__frozen_layers=first).flops
        for layers, first in ((4, 0), (8, 0), (4, 2), (8, 6))
    }
    whole = (flops[8, 0] - flops[4, 0]) / 4
    frozen = (flops[8, 6] - flops[4, 2]) / 4
    assert frozen / whole == pytest.approx(1 / 3 if remat == "none" else 1 / 4, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__layers_as": "scan"}, r"train.frozen_layers = 1 with model.layers_as = 'scan'(.|\n)*unrolled"),
        ({"train__frozen_layers": 2}, r"train.frozen_layers = 2, but model.layers = 1.\n  Accepted: 0 to 1"),
        ({"train__trainable": "embed/.*"}, r"train.frozen_layers = 1 freezes all that train.trainable = 'embed/\.\*' selects"),
        (
            {"train__transforms": ("lora",), "lora__also": "embed/.*", "model__layers": 2},
            r"train.frozen_layers = 1 freezes all that lora.also = 'embed/\.\*' selects",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.make(**{"train__frozen_layers": 1} | changes).abstract()


@pytest.mark.parametrize("first", [2, LAYERS])
def test_a_run_goes_on_from_its_checkpoint(tmp_path, first):
    options = DEEP | {"train__frozen_layers": first, "train__ema_decay": 0.5}
    training, step = tiny.make(**options), tiny.compiled(**options)
    state, _ = step(training.create(), training.place(tiny.batch(0)))
    kept = Checkpoints(tmp_path)
    kept.save(1, state)
    straight, _ = step(state, training.place(tiny.batch(1)))
    kept.wait()
    found = kept.restore(training.abstract()).tree
    assert jax.tree.structure(found) == jax.tree.structure(training.abstract())
    resumed, _ = step(found, training.place(tiny.batch(1)))
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    whole = jax.eval_shape(training.model.init, jax.random.key(0))
    kept.save(2, resumed)
    kept.wait()
    jax.tree.map(np.testing.assert_array_equal, kept.load_params(whole, 2).tree, tree.combine(straight.ema, straight.frozen))
    kept.close()
