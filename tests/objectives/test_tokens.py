"""The objective against the model's own logits in NumPy float64, and its gradient against finite differences."""

import jax
import numpy as np
import pytest
import tiny_training as tiny

Z_LOSS, SMOOTHING = 1e-2, 0.1


@pytest.fixture(scope="module")
def parts():
    training = tiny.make(train__z_loss=Z_LOSS, train__label_smoothing=SMOOTHING, model__init_std=0.02, model__dropout_frac=0.3)
    params = training.model.init(jax.random.key(1))
    # Larger kernels than at the start, so that the loss is not the flat log V.
    return training, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def measure(parts):
    training, _ = parts
    return jax.jit(training.objective)


@pytest.mark.parametrize("seed", [None, 2])
def test_totals_equal_the_logits(parts, measure, seed):
    """With a key those of dropout by this key, and without one those of the whole model."""
    training, params = parts
    batch, rng = tiny.batch(), None if seed is None else jax.random.key(seed)
    beside = {"segments": batch["segments"], "positions": batch["positions"], "rng": rng}
    logits = np.asarray(jax.jit(training.model.apply)(params, batch["tokens"], **beside), np.float64)
    batch["targets"][::2] = logits.argmax(-1)[::2]  # so that some are right
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weights = batch["weights"].astype(np.float64)
    # Cross-entropy with (1 - eps) onehot + eps / V (Szegedy et al. 2016, section 7), as what it adds to the plain one.
    smoothing = SMOOTHING * ((log_z[..., None] - logits).mean(-1) - nll)
    expected = {
        "loss": (weights * nll).sum(),
        "accuracy": (weights * (logits.argmax(-1) == batch["targets"])).sum(),
        "penalty": (weights * (Z_LOSS * log_z**2 + smoothing)).sum(),
    }
    mean, metrics = measure(params, batch, rng)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].total, value, rtol=1e-5, err_msg=name)
        assert metrics[name].weight == weights.sum()
    np.testing.assert_allclose(mean.total, expected["loss"] + expected["penalty"], rtol=1e-5)
    assert mean.weight == weights.sum()
    assert 0.3 < expected["accuracy"] / weights.sum() < 0.7


def test_targets_of_weight_zero_do_not_count(parts, measure):
    _, params = parts
    batch = tiny.batch()
    other = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], (batch["targets"] + 1) % tiny.VOCAB)}
    assert (other["targets"] != batch["targets"]).any()
    assert jax.tree.leaves(measure(params, batch, None)) == jax.tree.leaves(measure(params, other, None))


def test_gradient_equals_finite_differences(parts, measure):
    """Along random directions, where the slope is about +-100, by the difference of fourth order: at h = 2e-3 its own error is below
    the rounding of the float32 total, 2^-24 * 500 / h = 0.02 or a few of them."""
    training, params = parts
    batch = tiny.batch()
    gradient = jax.jit(jax.grad(lambda params: training.objective(params, batch, None)[0].total))(params)
    leaves, treedef = jax.tree.flatten(params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.unflatten(treedef, [rng.standard_normal(x.shape).astype(np.float32) for x in leaves])
        slope = sum(np.vdot(np.float64(a), b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

        def at(h, direction=direction):
            return float(measure(jax.tree.map(lambda p, d: p + h * d, params, direction), batch, None)[0].total)

        h = 2e-3
        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        np.testing.assert_allclose(difference, slope, rtol=0, atol=0.1)
