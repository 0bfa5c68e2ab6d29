"""Bytes of a training state on a device beside ZeRO's formula, written out here from the config; and what no axis cuts."""

from typing import Any

import combinations
import jax
import pytest

from jaxllm.engine.session import Session, build_session, bytes_by_category
from jaxllm.parallel import layout, rules
from jaxllm.parallel import plan as plans
from jaxllm.transforms import tree

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, MLP, CONTEXT = 64, 32, 4, 4, 2, 64, 32
HEAD = WIDTH // HEADS


def build(family: str, **overrides: Any) -> Session:
    config = combinations.config_of(family, **overrides)
    return build_session(config, plans.make_abstract(config))


def adam_counters(session: Session) -> int:
    return sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(session.abstract.opt_state) if not leaf.ndim)


@pytest.mark.parametrize("layers_as", ["scan", "unrolled"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_are_those_of_the_formula(stage: int, layers_as: str) -> None:
    """(4 + 4 + 8) bytes a number over N devices: llama has no biases, and all that it has divides."""
    session = build("llama", model__layers_as=layers_as, parallel__fsdp=8, parallel__data=2, parallel__zero_stage=stage)
    layer = WIDTH * (2 * HEADS + 2 * KV_HEADS) * HEAD + 3 * WIDTH * MLP + 2 * WIDTH
    psi, n = 2 * VOCAB * WIDTH + LAYERS * layer + WIDTH, 8
    sizes = bytes_by_category(session)
    assert sizes["parameters"] == 4 * psi // (n if stage == 3 else 1)
    assert sizes["gradients"] == 4 * psi // (n if stage >= 2 else 1)
    assert sizes["optimizer"] - adam_counters(session) == 8 * psi // n
    book = layout.textbook(session.plan, psi, 8 * psi)
    assert [sizes["parameters"], sizes["gradients"], 8 * psi // n] == [*book.values()]
    assert layout.uncut(session.plan, session.abstract.opt_state) == {"fsdp": 0}
    assert layout.uncut(session.plan, session.abstract.params) == {"fsdp": 0 if stage == 3 else 1}


def test_what_fsdp_does_not_cut_is_stated() -> None:
    """gpt's biases of q, k, v and up have no dimension of the model's width: each device has all of them."""
    session = build("gpt", parallel__fsdp=8)
    whole = LAYERS * (3 * WIDTH + MLP)
    layer = 4 * WIDTH * WIDTH + 4 * WIDTH + 2 * WIDTH * MLP + MLP + WIDTH + 4 * WIDTH
    psi = (VOCAB + CONTEXT) * WIDTH + LAYERS * layer + 2 * WIDTH
    sizes = bytes_by_category(session)
    assert sizes["parameters"] == sizes["gradients"] == 4 * (whole + (psi - whole) // 8)
    assert sizes["optimizer"] - adam_counters(session) == 2 * sizes["parameters"]
    for held in (session.abstract.params, session.abstract.opt_state):
        assert layout.uncut(session.plan, held)["fsdp"] == pytest.approx(whole / psi, rel=1e-12)


def test_tensor_and_pipe_cut_too() -> None:
    """A pipeline's devices sum the gradients outside the layers whole over the stages; tensor does not cut the scales of norms."""
    shape = {"parallel__pipe": 2, "parallel__fsdp": 2, "parallel__tensor": 2, "model__layers_as": "scan", "train__microbatches": 2}
    session = build("llama", **shape)
    scales, kernels = 2 * WIDTH, WIDTH * (2 * HEADS + 2 * KV_HEADS) * HEAD + 3 * WIDTH * MLP
    layers = LAYERS * (kernels // 8 + scales // 4)
    tables = 2 * VOCAB * WIDTH
    sizes = bytes_by_category(session)
    assert sizes["gradients"] == 4 * (layers + tables // 4 + WIDTH // 2)
    assert sizes["parameters"] == 4 * (layers + tables // 8 + WIDTH // 2)
    uncut = layout.uncut(session.plan, session.abstract.params)
    psi = tables + LAYERS * (kernels + scales) + WIDTH
    assert uncut["tensor"] == pytest.approx((LAYERS * scales + WIDTH) / psi)
    assert uncut["pipe"] == pytest.approx(WIDTH / psi) and uncut["fsdp"] == 0


def test_entries_name_each_parameter_once() -> None:
    scan, unrolled = (build("t5", parallel__fsdp=4, model__layers_as=form) for form in ("scan", "unrolled"))
    listed = [layout.entries(each.plan, each.model.axes, each.abstract.params) for each in (scan, unrolled)]
    assert [entry.name for entry in listed[0]] == [entry.name for entry in listed[1]] == tree.names(scan.abstract.params)
    for one, other in zip(*listed, strict=True):
        assert (one.bytes, one.whole, one.parts) == (other.bytes, other.whole, other.parts)
    assert sum(entry.bytes for entry in listed[0]) == bytes_by_category(scan)["parameters"]


# Logical axes of activations only; all others are of parameters.
ACTIVATIONS = {"batch", "length", "stream", "embed_act", "kv_heads_act", "chunks"}


def test_every_rule_is_of_a_model() -> None:
    """A rule that matches no logical axis is a line too many in rules.py; an axis without a rule is an error (test_rules.py)."""
    models = [build(family, model__layers_as="scan").model for family in combinations.OBJECTIVES]
    models.append(build("bert", model__head="classify", model__classes=2, train__objective="sequence_classification").model)
    axes = {axis for model in models for axis in jax.tree.leaves(model.axes)}
    assert axes | ACTIVATIONS == set(rules.RULES)
