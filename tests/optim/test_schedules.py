"""Schedules against their closed forms, written out in NumPy."""

import jax
import numpy as np
import pytest

from jaxllm import config as configs
from jaxllm import registry
from jaxllm.optim import schedules

PEAK, WARMUP, STEPS, END = 3e-3, 7, 60, 0.1


def made(name, **fields):
    config = configs.base()
    config.optimizer.learning_rate = PEAK
    config.train.steps = STEPS
    config.schedule.update({"name": name, "warmup_steps": WARMUP, "end_frac": END} | fields)
    return jax.jit(jax.vmap(schedules.make(config)))


def nanogpt(it, warmup_iters, lr_decay_iters, learning_rate, min_lr):
    """get_lr of nanoGPT's train.py, as described there: warm-up, cosine, floor."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + np.cos(np.pi * ratio)) * (learning_rate - min_lr)


def after_warmup(name, n):
    left = (STEPS - 1 - n) / (STEPS - 1 - WARMUP)
    decay = round(0.2 * STEPS)
    return {
        "constant": 1.0,
        "linear": END + (1 - END) * left,
        "cosine": END + (1 - END) * 0.5 * (1 + np.cos(np.pi * (1 - left))),
        "wsd": 1.0 if n <= STEPS - 1 - decay else END + (1 - END) * (STEPS - 1 - n) / decay,
        "inverse_sqrt": max(END, ((WARMUP + 1) / (n + 1)) ** 0.5),
    }[name]


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_schedule_equals_its_closed_form(name):
    steps = np.arange(STEPS)
    expected = [PEAK * ((n + 1) / (WARMUP + 1) if n < WARMUP else after_warmup(name, n)) for n in steps]
    np.testing.assert_allclose(made(name)(steps), expected, rtol=1e-6)


def test_cosine_is_nanogpts_with_one_step_more_than_max_iters():
    steps = np.arange(STEPS + 5)
    expected = [nanogpt(it, WARMUP, STEPS - 1, PEAK, END * PEAK) for it in steps]
    np.testing.assert_allclose(made("cosine")(steps), expected, rtol=1e-6)


@pytest.mark.parametrize("end_frac", [0.0, 0.1, 0.3, 0.81, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_schedule_starts_above_zero_peaks_once_warm_and_ends_at_its_end(name, end_frac):
    """To the bit: no rounding but that of the float32 numbers and of their product."""
    rates = np.asarray(made(name, end_frac=end_frac)(np.array([0, WARMUP, STEPS - 1, STEPS + 100])))
    peak = np.float32(PEAK)
    end = peak * np.float32(end_frac)
    np.testing.assert_array_equal(rates, [np.float32(PEAK / (WARMUP + 1)), peak, end, end])


def test_wsd_that_decays_from_the_end_of_the_warmup_is_linear():
    steps = np.arange(STEPS)
    np.testing.assert_array_equal(made("wsd", decay_frac=1.0)(steps), made("linear")(steps))


def test_inverse_sqrt_never_falls_below_its_floor():
    assert np.asarray(made("inverse_sqrt")(np.array([10**6])))[0] == np.float32(PEAK * END)


def test_no_warmup_starts_at_the_peak():
    assert np.asarray(made("cosine", warmup_steps=0)(np.array([0])))[0] == np.float32(PEAK)


def test_warmup_that_outlasts_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule.warmup_steps = 60 is not less than train.steps = 60(.|\n)*Accepted: 0 to 59"):
        made("cosine", warmup_steps=STEPS)
