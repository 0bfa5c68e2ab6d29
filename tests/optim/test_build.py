"""Each optimizer against its paper in NumPy float64, layer by layer, for both forms of the layer stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config as configs
from jaxllm import registry
from jaxllm.optim import build
from jaxllm.transforms import tree

LAYERS, RATE, DECAY, B1, B2, EPS, UPDATES = 2, 1e-2, 0.3, 0.9, 0.95, 1e-6, 2
# Large enough that adafactor factors the attention kernels (128 x 160) as matrices, though no two of their sides reach 128.
ONE_LAYER = {
    "attention/norm/scale": ((128,), ("embed",)),
    "attention/q/kernel": ((128, 4, 40), ("embed", "heads", "head_dim")),
    "attention/q/bias": ((4, 40), ("heads", "head_dim")),
    "attention/o/kernel": ((4, 40, 128), ("heads", "head_dim", "embed")),
    "mlp/up/kernel": ((128, 16), ("embed", "mlp")),
}
OUTSIDE = {"embed/tokens": ((130, 128), ("vocab", "embed")), "head/kernel": ((130, 128), ("vocab", "embed"))}
GROUPS = ((".*(scale|bias)", 1.0, 0.0), ("layers/mlp/.*", 0.5, 2.0))
FROZEN = "head/kernel"
MATRICES = {"attention/q/kernel": (128, 160), "attention/o/kernel": (160, 128), "mlp/up/kernel": (128, 16)}


def nested(flat):
    out = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return out


def random_tree(seed):
    """Unrolled form, entries about as large as an update. A scale for each layer, so that a statistic over the stack would show."""
    rng = np.random.default_rng(seed)
    layers = [
        nested(
            {name: (0.02 * 5.0**index * rng.standard_normal(shape)).astype(np.float32) for name, (shape, _) in ONE_LAYER.items()}
        )
        for index in range(LAYERS)
    ]
    outside = {name: 0.02 * rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in OUTSIDE.items()}
    return nested(outside | {FROZEN: None}) | {"layers": layers}


def axes(form):
    one = nested({name: leaf_axes for name, (_, leaf_axes) in ONE_LAYER.items()})
    stacked = nested({name: ("layers", *leaf_axes) for name, (_, leaf_axes) in ONE_LAYER.items()})
    return nested({name: leaf_axes for name, (_, leaf_axes) in OUTSIDE.items()}) | {
        "layers": stacked if form == "scan" else [one] * LAYERS
    }


def optimizer(name, form, groups=GROUPS):
    config = configs.base()
    config.optimizer.update({"name": name, "b1": B1, "b2": B2, "eps": EPS, "weight_decay": DECAY, "groups": groups})
    return build.make(config, axes(form))


def run(name, form):
    """(parameters after some updates, optimizer state), in the given form."""
    as_form = tree.stack_layers if form == "scan" else (lambda values: jax.tree.map(jnp.asarray, values))
    made = optimizer(name, form)
    params = as_form(random_tree(0))
    state = jax.jit(made.init)(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = made.update(gradients, state, params)
        return jax.tree.map(lambda p, u: p + RATE * u, params, updates), state

    for seed in range(1, UPDATES + 1):
        params, state = step(params, state, as_form(random_tree(seed)))
    return params, state


def adamw_direction(memory, g, p, t, name):
    memory["m"] = B1 * memory.get("m", 0) + (1 - B1) * g
    memory["v"] = B2 * memory.get("v", 0) + (1 - B2) * g**2
    return memory["m"] / (1 - B1**t) / (np.sqrt(memory["v"] / (1 - B2**t)) + EPS)


def lion_direction(memory, g, p, t, name):
    m = memory.get("m", 0)
    memory["m"] = B2 * m + (1 - B2) * g
    return np.sign(B1 * m + (1 - B1) * g)


def adafactor_direction(memory, g, p, t, name):
    """Shazeer and Stern 2018, algorithms 4 (matrices) and 5 (others), with eps1 = 1e-30, eps2 = 1e-3, d = 1."""
    shape = g.shape
    short = name.removeprefix("layers/")
    g = g.reshape(MATRICES.get(short, shape))
    decay = 1 - t**-0.8
    squared = g**2 + 1e-30
    if g.ndim == 2 and min(g.shape) >= 128:
        memory["r"] = decay * memory.get("r", 0) + (1 - decay) * squared.sum(1)
        memory["c"] = decay * memory.get("c", 0) + (1 - decay) * squared.sum(0)
        v = np.outer(memory["r"], memory["c"]) / memory["r"].sum()
    else:
        v = memory["v"] = decay * memory.get("v", 0) + (1 - decay) * squared
    u = g / np.sqrt(v)
    u /= max(1, np.sqrt(np.mean(u**2)))
    return (u * max(1e-3, np.sqrt(np.mean(p**2)))).reshape(shape)


def muon_direction(memory, g, p, t, name):
    """Newton-Schulz acts on singular values alone: five times s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, from s / |s|."""
    short = name.removeprefix("layers/")
    if short not in MATRICES:
        return adamw_direction(memory, g, p, t, name)
    memory["m"] = B1 * memory.get("m", 0) + (1 - B1) * g
    nesterov = B1 * memory["m"] / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t)
    left, s, right = np.linalg.svd(nesterov.reshape(MATRICES[short]), full_matrices=False)
    s /= np.sqrt(np.sum(s**2))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return ((left * s) @ right * 0.2 * np.sqrt(max(MATRICES[short]))).reshape(g.shape)


DIRECTIONS = {"adamw": adamw_direction, "lion": lion_direction, "adafactor": adafactor_direction, "muon": muon_direction}
# Relative to the largest entry; float32 rounding, which five Newton-Schulz steps magnify by up to 3.4445^5 = 485.
TOLERANCE = {"adamw": 1e-6, "lion": 1e-6, "adafactor": 1e-6, "muon": 1e-5}


def oracle(direction):
    params = tree.named_leaves(jax.tree.map(np.float64, random_tree(0)))
    memories = [{} for _ in params]
    for t in range(1, UPDATES + 1):
        gradients = [g.astype(np.float64) for _, g in tree.named_leaves(random_tree(t))]
        after = []
        for (name, p), g, memory in zip(params, gradients, memories, strict=True):
            rate, decay = (1, 0) if name.endswith(("scale", "bias")) else (0.5, 2) if "mlp/" in name else (1, 1)
            after.append((name, p - RATE * rate * (direction(memory, g, p, t, name) + DECAY * decay * p)))
        params = after
    return params


@pytest.fixture(scope="module", params=registry.names("optimizer"))
def both(request):
    return request.param, run(request.param, "unrolled"), run(request.param, "scan")


def test_updates_equal_the_paper(both):
    name, (params, _), _ = both
    found = tree.named_leaves(params)
    for (path, leaf), (_, expected) in zip(found, oracle(DIRECTIONS[name]), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(leaf / scale, expected / scale, rtol=0, atol=TOLERANCE[name], err_msg=path)


def test_scan_equals_unrolled_and_their_states_have_one_canonical_form(both):
    name, unrolled, scan = both
    stacked = tree.stack_layers(unrolled)
    assert jax.tree.structure(stacked) == jax.tree.structure(scan)
    for (path, a), (_, b) in zip(tree.named_leaves(stacked), tree.named_leaves(scan), strict=True):
        assert a.shape == b.shape, path
        scale = np.abs(a).max() + 1e-30
        np.testing.assert_allclose(b / scale, a / scale, rtol=0, atol=TOLERANCE[name], err_msg=path)


def test_frozen_parameters_have_no_state(both):
    _, (params, state), _ = both
    assert params["head"]["kernel"] is None
    assert not [path for path in tree.names(state) if path.endswith(FROZEN)]
    assert [path for path in tree.names(state) if path.endswith("embed/tokens")]


def test_adafactor_keeps_rows_and_columns_only():
    _, state = run("adafactor", "unrolled")
    held = sum(leaf.size for path, leaf in tree.named_leaves(state) if path.endswith("attention/q/kernel"))
    assert held == LAYERS * (128 + 160 + 1)  # the 1 is optax's placeholder for the full second moment


def test_a_pattern_that_selects_nothing_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.groups\[0\]: pattern 'mlp' selects no parameter"):
        optimizer("adamw", "unrolled", groups=(("mlp", 1.0, 1.0),))


def test_layers_may_be_frozen_altogether():
    params = tree.stack_layers(random_tree(0)) | {"layers": jax.tree.map(lambda _: None, random_tree(0)["layers"][0])}
    made = optimizer("muon", "scan")
    updates, _ = made.update(params, made.init(params), params)
    assert [path for path, _ in tree.named_leaves(updates)] == ["embed/tokens"]
