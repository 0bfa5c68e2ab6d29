"""What is predicted to travel in a step, beside what the compiled program does: equal to the byte and to the array.

The prediction knows axes and shapes. The compiled program is read by parallel/collectives.py, whose own tests are in test_collectives.py.
"""

import math
from typing import Any

import combinations
import jax
import pytest

from jaxllm import dry_run
from jaxllm.engine import step
from jaxllm.engine.session import Session, build_session, bytes_by_category
from jaxllm.parallel import activations, collectives, traffic
from jaxllm.parallel import plan as plans
from jaxllm.parallel.traffic import Amount

# Counters of a TrainState: step, skipped, skipped_in_a_row; int32.
COUNTERS = 12


def build(family: str, **overrides: Any) -> Session:
    config = combinations.config_of(family, **overrides)
    sizes = (config.parallel[axis] for axis in ("pipe", "data", "fsdp", "seq", "tensor"))
    return build_session(config, plans.make(config, jax.devices()[: math.prod(sizes)]))


def predict(session: Session) -> list[traffic.Row]:
    # XLA's CPU compiler sums the gradients of each product over tensor by themselves.
    rows, note = dry_run.moved(session, adds_first=False)
    assert not note
    return rows


def compile(session: Session) -> Any:
    return step.lower(session.update, session.abstract, step.abstract_batch(session.config, session.plan)).compile()


SCAN = {"model__layers": 3, "model__layers_as": "scan"}
UNROLLED = {"model__layers": 2, "model__layers_as": "unrolled"}
MIXED = {"parallel__data": 2, "parallel__fsdp": 4}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {**SCAN, **MIXED, "parallel__zero_stage": 1, "train__microbatches": 2}),
        ("llama", {**SCAN, **MIXED, "parallel__zero_stage": 2, "train__microbatches": 2}),
        ("llama", {**SCAN, **MIXED, "parallel__zero_stage": 3, "train__microbatches": 2}),
        ("llama", {**SCAN, **MIXED, "parallel__zero_stage": 3, "model__remat": "full"}),
        ("gpt", {**SCAN, "parallel__fsdp": 8, "parallel__zero_stage": 3}),
        ("gpt", {**UNROLLED, **MIXED, "parallel__zero_stage": 2, "model__remat": "dots"}),
        ("gpt", {**UNROLLED, "parallel__data": 8}),
        ("llama", {**SCAN, "parallel__fsdp": 2, "parallel__tensor": 4, "model__kv_heads": 4, "model__remat": "full"}),
        ("gpt", {**SCAN, "parallel__fsdp": 4, "parallel__tensor": 2, "train__microbatches": 2}),
        ("gpt", {**SCAN, "model__layers": 4, "parallel__pipe": 2, "parallel__data": 2, "train__microbatches": 4}),
        ("bert", {**SCAN, **MIXED, "parallel__zero_stage": 3, "model__remat": "named"}),
        ("t5", {**UNROLLED, **MIXED, "parallel__zero_stage": 1}),
        ("transformer", {**SCAN, **MIXED, "parallel__zero_stage": 3, "model__remat": "dots"}),
        ("llama", {**SCAN, **MIXED, "parallel__zero_stage": 3, "train__transforms": ("lora",), "train__microbatches": 2}),
        ("gpt", {**SCAN, **MIXED, "parallel__zero_stage": 2, "train__transforms": ("dora",)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(part) for part in value.values()),
)
def test_the_compiled_step_moves_what_is_predicted(family: str, overrides: dict) -> None:
    session = build(family, **overrides)
    compiled = compile(session)
    found = collectives.read(compiled.as_text(), session.plan.mesh)
    differences = traffic.compare(predict(session), found)
    assert differences and all(each.predicted == each.found for each in differences), differences
    sizes = bytes_by_category(session)
    held = sum(sizes[name] for name in ("parameters", "optimizer", "average", "batch"))
    assert compiled.memory_analysis().argument_size_in_bytes == held + COUNTERS


def test_the_backward_pass_does_not_keep_what_was_gathered() -> None:
    """With 8 layers instead of 2 the temporaries grow by far less than the 6 layers that are gathered one after the other (ZeRO-3)."""
    shape = {"model__width": 128, "model__mlp_width": 512, "model__context_tokens": 8, "train__batch_seqs": 8}
    few, many = (
        build("llama", **shape, parallel__fsdp=8, model__layers_as="scan", model__layers=layers, model__remat="none")
        for layers in (2, 8)
    )
    more = compile(many).memory_analysis().temp_size_in_bytes - compile(few).memory_analysis().temp_size_in_bytes
    gathered = 4 * sum(leaf.size for leaf in jax.tree.leaves(many.abstract.params["layers"])) * 6 // 8
    assert gathered == 5_904_384 and more < gathered / 3


def test_an_unrolled_stack_on_a_cpu() -> None:
    """The CPU's compiler drops the barriers that keep both passes apart, and merges their gathers."""
    session = build("llama", **UNROLLED, parallel__fsdp=8, parallel__zero_stage=3)
    rows = [row for row in predict(session) if row.what != traffic.BACKWARD]
    found = collectives.read(compile(session).as_text(), session.plan.mesh)
    assert all(each.predicted == each.found for each in traffic.compare(rows, found))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_multiples_of_the_model(microbatches: int) -> None:
    """Rajbhandari et al. 2020, section 7: 2, 2 and 3 times the model a step; here but for embedding and head, which ZeRO-3 gathers once."""
    shape = {**SCAN, **MIXED, "train__batch_seqs": 32, "train__microbatches": microbatches}
    built = {stage: build("llama", **shape, parallel__zero_stage=stage) for stage in (1, 2, 3)}
    params = built[1].abstract.params
    psi, rest = (4 * sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, {**params, "layers": {}}))
    moved = {stage: sum(row.bytes for row in predict(session) if row.kind != "all-reduce") for stage, session in built.items()}
    assert moved == {1: 2 * psi, 2: (microbatches + 1) * psi, 3: microbatches * (3 * psi - rest)}
    assert [sum(row.bytes for row in predict(session) if row.kind == "all-reduce") for session in built.values()] == [psi // 4] * 3


def test_tensor_parallelism_is_that_of_the_paper() -> None:
    """Shoeybi et al. 2019, figure 4: two sums of [B, T, D] a layer forward and two backward; and one for the embedding, cut by rows."""
    session = build("gpt", parallel__tensor=4, model__remat="none")
    rows = activations.over_tensor(session.plan, session.model, session.config, session.row_tokens)
    array = 4 * combinations.ROWS * combinations.LENGTH * 32
    assert rows is not None and [(row.arrays, row.bytes) for row in rows[:2]] == [(1 + 2 * 4, 9 * array), (2 * 4, 8 * array)]
    assert rows[2].bytes == array + 4 * 4 * combinations.ROWS * combinations.LENGTH
    refused = build("gpt", parallel__tensor=4, parallel__sequence=True)
    assert activations.over_tensor(refused.plan, refused.model, refused.config, refused.row_tokens) is None


def test_one_device_moves_nothing() -> None:
    assert predict(build("gpt")) == []
    assert traffic.compare([], []) == []


def test_differences_are_seen() -> None:
    line = "%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum"
    found = collectives.read(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n")
    row = traffic.Row("gradients", "all-gather", ("fsdp",), 2, 3, 64)
    assert traffic.compare([row], found) == [
        (("all-gather", ("fsdp",)), Amount(3, 64), Amount(0, 0)),
        (("all-reduce", ()), Amount(0, 0), Amount(1, 32)),
    ]
    assert row.sent == 32
