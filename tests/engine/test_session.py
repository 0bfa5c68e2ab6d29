"""What a setup says of itself before it trains: how much is trained, and what is wasteful."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_training as tiny

from jaxllm.engine.session import build_session, narrow_products
from jaxllm.parallel import plan

WIDTH, MLP, KV, HEADS = 32, 48, 16, 32


def session_of(**fields: Any) -> Any:
    config = tiny.config_of({key.replace("__", "."): value for key, value in fields.items()})
    return build_session(config, plan.make(config, jax.devices()[:1]))


def sides(rank: int) -> int:
    """Numbers of the adapters of one layer: a rank for each input and output of q, k, v, o, gate, up and down."""
    return rank * (2 * (WIDTH + HEADS) + 2 * (WIDTH + KV) + 3 * (WIDTH + MLP))


def dense() -> int:
    return tiny.VOCAB * WIDTH * 2 + (2 * WIDTH * HEADS + 2 * WIDTH * KV + 3 * WIDTH * MLP) + 3 * WIDTH


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize(
    ("fields", "trained", "beside", "moments"),
    [
        ({"train__transforms": ("lora",), "lora__rank": 4}, sides(4), sides(4), 2),
        ({"train__transforms": ("int8", "dora"), "lora__rank": 2}, sides(2) + 2 * MLP + HEADS + 2 * KV + 2 * WIDTH, None, 2),
        ({"train__trainable": ".*norm/.*"}, 3 * WIDTH, 0, 2),
        ({"train__trainable": ".*norm/.*", "optimizer__name": "lion"}, 3 * WIDTH, 0, 1),
    ],
)
def test_the_share_that_is_trained_is_said(
    layers_as: str, fields: dict[str, Any], trained: int, beside: int | None, moments: int
) -> None:
    session = session_of(**fields, model__layers_as=layers_as)
    trained_of, whole, percent, held = re.fullmatch(
        r"llama, ([\d,]+) of ([\d,]+) parameters are trained \(([\d.]+)%\), the optimizer holds ([\d,]+) bytes for them",
        session.describe(),
    ).groups()
    trained_of, whole, held = (int(text.replace(",", "")) for text in (trained_of, whole, held))
    beside = trained if beside is None else beside
    assert (trained_of, whole) == (trained, dense() + beside)
    assert float(percent) == pytest.approx(100 * trained / (dense() + beside), abs=5e-4)
    state = session.create()
    # Besides the moments there are counters, of which the figure has every byte, too.
    assert held == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert 0 <= held - 4 * moments * trained <= 16


def test_a_full_training_is_said_in_short() -> None:
    assert session_of().describe() == f"llama, {dense():,} trainable parameters"


@pytest.mark.parametrize(
    ("fields", "tables"),
    [
        ({}, ""),
        ({"train__transforms": ("lora",)}, ""),
        ({"train__trainable": "embed/tokens|head/kernel"}, ""),
        ({"train__trainable": ".*mlp/.*"}, "embed/tokens, head/kernel"),
        ({"train__frozen_layers": 1}, "embed/tokens"),
        ({"train__frozen_layers": 1, "train__transforms": ("lora",), "lora__targets": ".*layers/.*/v/kernel"}, "embed/tokens"),
        ({"train__trainable": ".*mlp/.*", "model__tied_head": "on"}, "embed/tokens"),
    ],
)
def test_new_tokens_that_are_not_trained_are_said(fields: dict[str, Any], tables: str) -> None:
    for start_rows in (0, tiny.VOCAB - 2, tiny.VOCAB):
        session = session_of(**fields, model__start_rows=start_rows, model__layers=2)
        found = [note for note in session.notes() if "new tokens" in note]
        line = f"2 new tokens stay the mean of the others in {tables}: train.trainable or train.frozen_layers freezes them"
        assert found == ([line] if tables and start_rows == tiny.VOCAB - 2 else [])


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
@pytest.mark.parametrize(
    ("rank", "targets", "kernels"),
    [
        (KV, ".*layers/.*/kernel", ""),
        (KV + 1, ".*layers/.*/kernel", "layers/attention/k/kernel (16), layers/attention/v/kernel (16)"),
        (33, ".*layers/.*(v|down)/kernel", "layers/attention/v/kernel (16), layers/mlp/down/kernel (32)"),
    ],
)
def test_a_rank_that_no_product_has_is_said_of_each_kernel_once(layers_as: str, rank: int, targets: str, kernels: str) -> None:
    fields = {"train__transforms": ("lora",), "lora__rank": rank, "lora__targets": targets, "model__layers": 2}
    _, *found = session_of(**fields, model__layers_as=layers_as).notes()  # the first one: random weights
    line = f"lora.rank = {rank} is more than the smaller side of {kernels}: a product of A and B has no higher rank than that"
    assert found == ([line] if kernels else [])


@pytest.mark.parametrize(
    ("platform", "compute", "precision", "said"),
    [
        ("gpu", "float32", None, "TF32"),
        ("tpu", "float32", None, "bfloat16, with 7 bits"),
        ("gpu", "float32", "highest", ""),
        ("gpu", "bfloat16", None, ""),
        ("cpu", "float32", None, ""),
    ],
)
def test_float32_that_is_none_is_said(platform: str, compute: str, precision: str | None, said: str) -> None:
    device: Any = SimpleNamespace(platform=platform, device_kind="some device")
    with jax.default_matmul_precision(precision):
        found = narrow_products(tiny.config_of({"precision.compute": compute}), device)
        assert len(found) == bool(said) and all(said in line and "on some device" in line for line in found)
        assert not session_of(precision__compute=compute).notes()  # this device is a CPU
