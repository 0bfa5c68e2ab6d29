"""The state at step 0: what it holds, and that it is born where the plan says."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.engine import state as states
from jaxllm.transforms import tree

MESH = {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2}


def test_state_is_created_as_planned():
    training = tiny.make(train__ema_decay=0.9, precision__compute="float16", **MESH)
    planned, made = training.abstract(), training.create()
    assert jax.tree.structure(planned) == jax.tree.structure(made)
    for (name, a), (_, b) in zip(tree.named_leaves(planned), tree.named_leaves(made), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), name
    shards = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in tree.named_leaves(made)}
    # [D, H, K] with D over fsdp = 2 and H over tensor = 2.
    for owner in ("params", "ema", "opt_state/mu", "opt_state/nu"):
        assert shards[f"{owner}/layers/attention/q/kernel"] == (16, 2, 8)
    assert made.step == made.skipped == made.skipped_in_a_row == 0
    assert made.loss_scale.scale == training.config.precision.loss_scale


def test_initial_parameters_do_not_depend_on_the_mesh():
    one, eight = tiny.make().create(), tiny.make(**MESH).create()
    for (name, a), (_, b) in zip(tree.named_leaves(one.params), tree.named_leaves(eight.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_frozen_parameters_are_apart():
    training = tiny.make(train__trainable=".*mlp.*", train__ema_decay=0.5)
    state = training.create()
    assert (
        set(tree.names(state.params))
        == set(tree.names(state.ema))
        == {name for name in tree.names(training.model.axes) if "mlp" in name}
    )
    assert set(tree.names(state.frozen)) == {name for name in tree.names(training.model.axes) if "mlp" not in name}
    assert not [name for name in tree.names(state.opt_state) if "attention" in name or "embed" in name]
    whole = states.full_params(state)
    assert jax.tree.structure(whole) == jax.tree.structure(jax.eval_shape(training.model.init, jax.random.key(0)))


def test_evaluation_takes_the_average_if_there_is_one():
    training = tiny.make(train__trainable=".*mlp.*", train__ema_decay=0.5)
    state = training.create()
    averaged = replace(state, ema=jax.tree.map(lambda x: x + 1, state.ema))
    kernel = states.eval_params(averaged)["layers"][0]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, state.params["layers"][0]["mlp"]["up"]["kernel"] + 1)
    assert states.eval_params(averaged)["embed"]["tokens"] is state.frozen["embed"]["tokens"]
    assert tiny.make().create().ema is None
    without = replace(state, ema=None)
    assert states.eval_params(without)["layers"][0]["mlp"]["up"]["kernel"] is state.params["layers"][0]["mlp"]["up"]["kernel"]


def test_the_seed_decides():
    first, again, other = (tiny.make(seed=seed).create().params["embed"]["tokens"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert states.random_key(0, "init") != states.random_key(0, "dropout")


def test_a_pattern_that_trains_nothing_is_refused():
    training = tiny.make(train__trainable="mlp")
    with pytest.raises(ValueError, match=r"train.trainable: pattern 'mlp' selects no parameter(.|\n)*layers/attention"):
        training.abstract()


def test_adapters_that_nothing_trains_are_refused():
    training = tiny.make(train__transforms=("lora",), train__trainable=".*norm.*")
    with pytest.raises(ValueError, match=r"selects no array of the adapters(.|\n)*attention/k/kernel/a(.|\n)*lora.also"):
        training.abstract()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"train__transforms": ("int8",)},
            r"train.transforms = \('int8',\) without an adapter: nothing is trained\. .*\n  Accepted: \('int8', 'lora'\),"
            r".*train\.trainable.*\n  Add 'lora'",
        ),
        (
            {"train__transforms": ("int8",), "train__trainable": ".*mlp/up/.*"},
            r"trainable = '.*' selects layers/mlp/up/kernel/codes, which train.transforms = \('int8',\) quantized: .*\n  Accepted: .*\n  ",
        ),
    ],
)
def test_codes_are_not_trained(fields, words):
    with pytest.raises(ValueError, match=words):
        tiny.make(**fields, quant__group=16).abstract()


def test_beside_frozen_codes_something_else_may_be_trained():
    below = tiny.make(train__transforms=("int8",), train__frozen_layers=1).abstract()
    norms = tiny.make(train__transforms=("int8",), train__trainable=".*norm/.*").abstract()
    assert set(tree.names(below.params)) == {"norm/scale", "head/kernel"}
    assert set(tree.names(norms.params)) == {"norm/scale", "layers/attention/norm/scale", "layers/mlp/norm/scale"}
