"""Narrow optimizer state: its bytes, its place on a mesh, the same bits in both forms of the stack, and what training reaches with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm import config as configs
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.session import build_session
from jaxllm.optim import build, small_state
from jaxllm.parallel import plan as plans
from jaxllm.transforms import tree

LAYERS = 3
AXES = {
    "layers": {
        "norm": {"scale": ("embed",)},
        "attention": {"q": {"kernel": ("embed", "heads", "head_dim")}, "o": {"kernel": ("heads", "head_dim", "embed")}},
        "mlp": {"up": {"kernel": ("embed", "mlp")}, "odd": {"kernel": ("embed", "mlp")}},
    },
    "embed": {"tokens": ("vocab", "embed")},
}
SHAPES = {
    "layers/norm/scale": (64,),
    "layers/attention/q/kernel": (64, 4, 16),  # 4096 numbers: just enough; blocks of 16
    "layers/attention/o/kernel": (4, 16, 64),
    "layers/mlp/up/kernel": (64, 768),  # blocks of 256
    "layers/mlp/odd/kernel": (64, 67),  # a prime: one block a row
    "embed/tokens": (80, 514),  # blocks of 257 are too long: blocks of 2 are too short
}


def values(form, seed):
    """Parameters or gradients."""
    rng = np.random.default_rng(seed)

    def one(path, axes):
        del axes
        return rng.normal(size=SHAPES[tree.path_name(path)]).astype(np.float32)

    layer = {"layers": AXES["layers"]}
    layers = [jax.tree.map_with_path(one, layer, is_leaf=lambda node: isinstance(node, tuple))["layers"] for _ in range(LAYERS)]
    unrolled = {"layers": layers, "embed": {"tokens": one((jax.tree_util.DictKey("embed"), jax.tree_util.DictKey("tokens")), ())}}
    return tree.stack_layers(unrolled) if form == "scan" else jax.tree.map(jnp.asarray, unrolled)


def axes_of(form):
    if form == "unrolled":
        return AXES | {"layers": [AXES["layers"]] * LAYERS}
    return AXES | {"layers": jax.tree.map(lambda axes: ("layers", *axes), AXES["layers"], is_leaf=lambda x: isinstance(x, tuple))}


@functools.cache
def run(name, kind, form):
    """(last updates, state) after three steps."""
    config = configs.base()
    config.optimizer.update({"name": name, "state": kind})
    made, params = build.make(config, axes_of(form)), values(form, 0)
    state = jax.jit(made.init)(params)
    update = jax.jit(made.update)
    for seed in (1, 2, 3):
        updates, state = update(values(form, seed), state, params)
    return updates, state


WIDE = ("layers/norm/scale",)


@pytest.mark.parametrize("form", ["unrolled", "scan"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_bytes_are_those_of_the_formulas(kind, form):
    """adamw: 2 x 2 bytes a number, or 2 x (1 + 4 / block); small and oddly shaped arrays 2 x 4; two counters."""
    config = configs.base()
    config.optimizer.state = kind
    abstract = jax.eval_shape(build.make(config, axes_of(form)).init, values(form, 0))
    blocks = {"q": 16, "o": 64, "up": 256, "odd": 67}
    expected = 8  # two counters
    for name, shape in SHAPES.items():
        copies, size = LAYERS if name.startswith("layers") else 1, int(np.prod(shape))
        if name in WIDE or (kind == "int8" and name == "embed/tokens"):
            each = 4 * size
        else:
            each = 2 * size if kind == "bfloat16" else size + 4 * size // blocks[name.split("/")[2]]
        expected += 2 * copies * each
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)) == expected
    for path, leaf in tree.named_leaves(abstract.state):
        if path.endswith("mlp/up/kernel"):
            assert leaf.dtype == {"bfloat16": "bfloat16", "int8": "uint8" if "nu/" in path else "int8"}[kind]


@pytest.mark.parametrize(("name", "kind"), [("adamw", "int8"), ("lion", "bfloat16"), ("muon", "int8")])
def test_both_forms_of_the_stack_give_the_same_bits(name, kind):
    """But where float32 was rounded differently before, which moves a code to its neighbour only if the noise falls in between."""
    one, two = (run(name, kind, form) for form in ("unrolled", "scan"))
    stacked = tree.stack_layers(one)
    assert jax.tree.structure(stacked) == jax.tree.structure(two)
    for (path, a), (_, b) in zip(tree.named_leaves(stacked[1]), tree.named_leaves(two[1]), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=path)
        else:
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3, path
    layers = stacked[1].state
    q = next(leaf for path, leaf in tree.named_leaves(layers) if path.endswith("attention/q/kernel"))
    assert np.mean(np.asarray(q[0]) != np.asarray(q[1])) > 0.5


def test_updates_are_close_to_those_of_float32():
    exact, _ = run("adamw", "float32", "unrolled")
    for kind, tolerance in (("bfloat16", 0.005), ("int8", 0.06)):
        updates, _ = run("adamw", kind, "unrolled")
        for (path, a), (_, b) in zip(tree.named_leaves(exact), tree.named_leaves(updates), strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < tolerance, path
            if path in WIDE:
                np.testing.assert_array_equal(a, b)


TINY = {"model__width": 64, "model__mlp_width": 128, "optimizer__b2": 0.99}


def train(state, steps, **overrides):
    training = tiny.make(**TINY, **overrides)
    step = tiny.compiled(**TINY, **overrides).executable
    losses = []
    for index in range(steps):
        state, metrics = step(state, training.place(tiny.batch(index % 4)))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_training_reaches_the_loss_of_float32():
    """Four batches by heart in 100 steps, from 4.1 to below 1: within 3 percent."""
    ends = {}
    for kind in ("float32", "bfloat16", "int8"):
        _, losses = train(tiny.make(**TINY, optimizer__state=kind).create(), 100, optimizer__state=kind)
        ends[kind] = np.mean(losses[-4:])
    assert ends["float32"] < 1
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.01)
    assert ends["int8"] == pytest.approx(ends["float32"], rel=0.03)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_resuming_is_equal_to_the_bit(kind, tmp_path):
    training = tiny.make(**TINY, optimizer__state=kind)
    state, _ = train(training.create(), 3, optimizer__state=kind)
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(3, state, loss=None, meta={})
    checkpoints.close()
    restored = Checkpoints(tmp_path, keep_last=1, keep_best=0).restore(training.abstract()).tree
    one, two = (train(each, 3, optimizer__state=kind)[0] for each in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


def test_scales_are_shared_out_like_their_arrays():
    """fsdp 2 x tensor 4; whole blocks on each device, or the last axis of the scales is not shared."""
    config = configs.base()
    sizes = {"model.vocab_size": 64, "model.width": 64, "model.heads": 8, "model.layers": 1, "model.mlp_width": 1024}
    for key, value in {**sizes, "parallel.data": 1, "parallel.fsdp": 2, "parallel.tensor": 4, "optimizer.state": "int8"}.items():
        section, _, name = key.rpartition(".")
        config[section][name] = value
    config.model.layers_as = "scan"
    small = build_session(config, plans.make(config)).abstract.opt_state
    assert isinstance(small, small_state.SmallState)
    codes, scales = (dict(tree.named_leaves(side)) for side in (small.state, small.scales))
    for path in ("nu/layers/mlp/up/kernel", "mu/layers/mlp/down/kernel", "mu/layers/attention/q/kernel"):
        assert scales[path].sharding.spec[:2] == codes[path].sharding.spec[:2]
        assert codes[path].shape[:-1] == scales[path].shape[:-1]
    # [layers, embed, mlp] in 4 blocks over 4 devices; [layers, mlp, embed] in one block, which two would have to share.
    assert scales["nu/layers/mlp/up/kernel"].sharding == codes["nu/layers/mlp/up/kernel"].sharding
    assert codes["mu/layers/mlp/down/kernel"].sharding.spec[-1] == "fsdp"
    assert scales["mu/layers/mlp/down/kernel"].shape[-1] == 1
    assert len(scales["mu/layers/mlp/down/kernel"].sharding.spec) == 2


def test_adafactor_is_refused():
    config = configs.base()
    config.optimizer.name, config.optimizer.state = "adafactor", "int8"
    with pytest.raises(ValueError, match="whose state is a row and a column of each matrix.\n  Accepted: float32 with adafactor"):
        configs.check(config)
