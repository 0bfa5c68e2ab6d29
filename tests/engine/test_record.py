"""The record of a checkpoint: what it notices about itself, and how it explains that a model does not fit."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.engine.record import CheckpointError, Leaf, Record, check_fits, check_meta, from_json

SHAPES = {
    "params/embed/tokens": (320, 8),
    "params/layers/attention/q/kernel": (3, 8, 4, 2),
    "params/layers/attention/k/kernel": (3, 8, 4, 2),
    "params/layers/mlp/up/kernel": (3, 8, 24),
    "params/norm/scale": (8,),
    "opt_state/0/mu/embed/tokens": (320, 8),
}
SAVED = {name: Leaf(shape, "float32", "00000000") for name, shape in SHAPES.items()}


def wanted(shapes: dict[str, tuple[int, ...]], dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


@pytest.mark.parametrize(
    ("shapes", "listed"),
    [
        ({"params/embed/tokens": (320, 16)}, "shape: params/embed/tokens ([320, 8] in the checkpoint, [320, 16] here)"),
        ({"params/embed/tokens": (320, 16)}, "likely different: model.width."),
        ({"params/embed/tokens": (100, 8)}, "likely different: model.vocab_size (or the tokenizer)."),
        ({"params/layers/attention/q/kernel": (3, 8, 2, 4)}, "likely different: model.heads, model.head_dim."),
        ({"params/layers/attention/k/kernel": (3, 8, 2, 2)}, "likely different: model.kv_heads."),
        ({"params/layers/mlp/up/kernel": (4, 8, 32)}, "likely different: model.layers, model.mlp_width."),
        ({"params/head/kernel": (320, 8)}, "not in the checkpoint: params/head/kernel ([320, 8])"),
        ({"params/head/kernel": (320, 8), "opt_state/0/mu/head/kernel": (320, 8)}, "likely different: model.tied_head."),
        ({"params/norm/bias": (8,)}, "likely different: model.norm or model.bias."),
        ({"params/layers/mlp/gate/kernel": (3, 8, 24)}, "likely different: model.activation."),
        ({"ema/embed/tokens": (320, 8)}, "likely different: train.ema_decay."),
        ({"loss_scale/scale": ()}, "likely different: precision.compute."),
        ({f"opt_state/1/nu/{index}": (1,) for index in range(6)}, "opt_state/1/nu/3 ([1]), and 2 more"),
    ],
)
def test_a_difference_is_listed_and_explained(shapes: dict[str, tuple[int, ...]], listed: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_fits(SAVED, wanted(SHAPES | shapes), {}, "checkpoint /run/3")
    assert str(caught.value).startswith("checkpoint /run/3 is from another model or another setup; nothing was loaded.\n")
    assert listed in str(caught.value)


def test_what_fits_passes_and_what_is_left_over_or_cast_does_not() -> None:
    check_fits(SAVED, wanted(SHAPES), {}, "")
    with pytest.raises(
        CheckpointError, match=r"only in the checkpoint: opt_state/0/mu/embed/tokens .*\n.*different: optimizer.name"
    ):
        check_fits(SAVED, wanted(without("opt_state/0/mu/embed/tokens")), {}, "")
    with pytest.raises(CheckpointError, match=r"dtype: params/embed/tokens \(float32 in the checkpoint, bfloat16 here\)"):
        check_fits(SAVED, wanted(SHAPES, jnp.bfloat16), {}, "")


def test_every_changed_character_of_the_file_is_noticed() -> None:
    leaves = {
        "params/norm/scale": Leaf((8,), "float32", "00000000"),
        "params/layers/norm/scale": Leaf((2, 8), "int8", "00000000", (1, 3)),
    }
    record = Record(7, 2.5, leaves, {"seed": [1, "x", None]}, {"state/d/a": 12}, "0123456789abcdef")
    text = json.dumps(record.to_json())
    assert from_json(json.loads(text)) == record
    for position in range(len(text)):
        changed = text[:position] + ("0" if text[position] != "0" else "1") + text[position + 1 :]
        with pytest.raises(ValueError):
            from_json(json.loads(changed))


@pytest.mark.parametrize(
    "meta", [{"x": (1, 2)}, {1: 2}, {"x": float("nan")}, {"x": object()}], ids=("tuple", "key", "nan", "object")
)
def test_meta_that_json_cannot_hold_is_refused(meta: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="(?s)meta of a checkpoint.*Accepted: .*Change the value"):
        check_meta(meta)
