"""The interpreter of schedules: what it computes, does, holds and sends. The whole grid of stages and micro-batches is in tests/matrix."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from parallel import combinations, pipelined

from jaxllm import models, registry
from jaxllm.engine import gradients
from jaxllm.parallel.region import Region
from jaxllm.parallel.stage import Carry, Row, Stage
from jaxllm.pipeline.schedule import Op
from jaxllm.pipeline.simulate import simulate
from jaxllm.transforms import tree

PASSES = {"forward": Op.FORWARD, "backward_input": Op.BACKWARD_INPUT, "backward_weight": Op.BACKWARD_WEIGHT}


# Each schedule once; 2, 4 and 8 stages; S, 2 S and 4 S micro-batches; one and several chunks.
@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches"), [("gpipe", 2, 8), ("1f1b", 8, 8), ("interleaved", 4, 8), ("zb_h1", 4, 16)]
)
def test_a_pipeline_computes_what_one_device_does(schedule: str, stages: int, microbatches: int) -> None:
    found = pipelined.deviations(schedule, stages, microbatches)
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_hand_written_backward_passes_equal_those_of_autodiff(family: str) -> None:
    """The oracle: GPipe as the program that is obvious, differentiated as a whole. Tied (gpt) and untied (llama) embeddings."""
    sizes = {"model__layers_as": "scan", "parallel__pipe": 4, "train__microbatches": 8}
    config, batch = combinations.config_of(family, parallel__schedule="gpipe", **sizes), combinations.batch_of(family)
    assert ("head" in combinations.parameters(models.build(config))) == (family == "llama")
    found = combinations.run(config, batch)
    total, expected = _gpipe_by_autodiff(config, batch)
    assert found.mean.total == pytest.approx(total, rel=1e-6)
    for (name, a), (_, b) in zip(tree.named_leaves(found.gradients), tree.named_leaves(expected), strict=True):
        size = np.abs(tree.get(expected, name.replace("/k/bias", "/q/bias").split("/"))).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * size, err_msg=name)


def _gpipe_by_autodiff(config: Any, batch: dict[str, np.ndarray]) -> tuple[float, Any]:
    """(loss, gradients): at tick t stage s sends micro-batch t - s through its layers; jax.grad makes the way back."""
    stages, count = config.parallel.pipe, config.train.microbatches
    model = models.build(config)
    objective, (stack,) = registry.resolve("objective", config.train.objective)(model, config), model.stacks
    parts = {name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
    params = combinations.parameters(model)
    layers, rest = tree.get(params, stack.path), tree.without(params, stack.path)
    each = stack.layers // stages

    def own(layers: Any, rest: Any, parts: Any) -> jax.Array:
        stage = jax.lax.axis_index("pipe")

        def tick(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
            x, total = carry
            part = {name: array[jnp.clip(t - stage, 0, count - 1)] for name, array in parts.items()}
            x = jnp.where(stage == 0, stack.enter(rest, part, None), x)
            block = stack.block(rest, {}, part, None)
            x, _ = jax.lax.scan(
                lambda x, one: (block(one[0], one[1], x, None)[0], None), x, (layers, stage * each + jnp.arange(each))
            )
            loss = objective.of_hidden(stack.leave(rest, x), model.head(rest), part)[0].total
            total += jnp.where((stage == stages - 1) & (t >= stages - 1), loss, 0.0)
            return (jax.lax.ppermute(x, "pipe", [(s, s + 1) for s in range(stages - 1)]), total), None

        like = jax.eval_shape(lambda: stack.enter(rest, {name: array[0] for name, array in parts.items()}, None))
        start = jnp.zeros(like.shape, like.dtype), jnp.float32(0)
        return jax.lax.scan(tick, start, jnp.arange(count + stages - 1))[0][1][None]

    cut, same = PartitionSpec("pipe"), PartitionSpec()
    mesh = jax.make_mesh((stages,), ("pipe",), axis_types=(AxisType.Auto,), devices=jax.devices()[:stages])
    program = jax.shard_map(own, mesh=mesh, in_specs=(cut, same, same), out_specs=cut, check_vma=False)
    gradient = jax.value_and_grad(lambda layers, rest: jnp.sum(program(layers, rest, parts)), argnums=(0, 1))
    total, (layers, rest) = jax.device_get(jax.jit(gradient)(layers, rest))
    return float(total), tree.replaced(rest | {stack.path[0]: None}, stack.path, layers)


@pytest.mark.parametrize("schedule", ["interleaved", "zb_h1"])
def test_what_is_executed_is_the_table(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while it runs: each operation of the table once, on its device; embedding and head only on the stages at the ends."""
    config = pipelined.config_of(schedule, 4, 8, model__layers=8)
    table = pipelined.table(config)
    done: Counter[tuple] = Counter()

    def note(what: str, *numbers: Any) -> None:
        jax.debug.callback(lambda *numbers: done.update([(what, *map(int, numbers))]), *numbers)

    def counted(name: str, run: Callable[..., Carry]) -> Callable[..., Carry]:
        def wrapped(stage: Stage, carry: Carry, row: Row) -> Carry:
            note(name, stage.stage, row.microbatch, row.chunk)
            return run(stage, carry, row)

        return wrapped

    for name in PASSES:
        monkeypatch.setattr(Stage, name, counted(name, getattr(Stage, name)))

    def at_the_ends(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            note(name, jax.lax.axis_index("pipe"))
            return run(*arguments)

        return wrapped

    plan, region, model, _ = combinations.make(config)
    (stack,) = model.stacks
    model = replace(model, stacks=(stack._replace(enter=at_the_ends("enter", stack.enter)),))
    objective = registry.resolve("objective", config.train.objective)(model, config)
    of_hidden = type(objective).of_hidden
    monkeypatch.setattr(type(objective), "of_hidden", at_the_ends("head", of_hidden))
    found = gradients.make(objective, model, config, Region(plan, model.axes, (stack.path,)))
    arguments = combinations.start(config, plan, model), combinations.place(plan, pipelined.batch()), None
    assert _scan_lengths(jax.make_jaxpr(found)(*arguments)) == {simulate(table).ticks}
    done.clear()
    jax.block_until_ready(jax.jit(found)(*arguments))
    jax.effects_barrier()
    for name, op in PASSES.items():
        expected = {(name, s, table.microbatch[t, s], table.chunk[t, s]): 1 for t, s in np.argwhere(table.op == op)}
        assert {key: times for key, times in done.items() if key[0] == name} == expected
    assert {key for key in done if key[0] in ("enter", "head")} == {("enter", 0), ("head", 3)}
    assert done["head", 3] == 8


def _scan_lengths(jaxpr: Any) -> set[int]:
    """Lengths of the scans in which stages send each other something."""

    def equations(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(getattr(inner, "jaxpr", inner))

    scans = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "scan"]
    sends = [scan for scan in scans if any(inner.primitive.name == "ppermute" for inner in equations(scan.params["jaxpr"].jaxpr))]
    return {scan.params["length"] for scan in sends}


def test_inputs_held_grow_with_micro_batches_in_gpipe_and_do_not_in_1f1b() -> None:
    """By the compiler's own figures. What else grows, a few words a token and a tick, is the same in both."""
    held, few = pipelined.temp_bytes("gpipe", 2, 4)
    grown = {name: pipelined.temp_bytes(name, 2, 16)[1] - pipelined.temp_bytes(name, 2, 4)[1] for name in ("gpipe", "1f1b")}
    assert grown["gpipe"] - grown["1f1b"] == pytest.approx(12 * held, rel=0.05)
    assert grown["1f1b"] < 0.1 * grown["gpipe"] and few > 4 * held


def test_parameters_outside_the_layers_are_cut_over_the_stages_at_rest() -> None:
    config = pipelined.config_of("1f1b", 4, 8)
    plan, _, model, _ = combinations.make(config)
    params = combinations.start(config, plan, model).params
    for name, leaf in tree.named_leaves(params):
        parts = 4 if leaf.ndim > 1 else 1  # the last norm's vectors are whole
        assert leaf.addressable_shards[0].data.nbytes * parts == leaf.nbytes, name


@pytest.mark.parametrize(
    ("family", "more"),
    [
        # Frozen kernels and frozen tables, trained biases and norms: some stages' factors have holes.
        ("gpt", {"train__trainable": ".*(mlp/up|/q)/kernel|.*bias|norm/scale", "parallel__fsdp": 2}),
        # The memory's gradient comes from all layers of the decoder while the encoder has nothing to train but its norms.
        ("t5", {"train__trainable": "decoder/.*|encoder/.*scale", "parallel__schedule": "interleaved"}),
    ],
)
def test_frozen_parameters_have_no_gradient_and_change_none(family: str, more: dict[str, Any]) -> None:
    batch = combinations.batch_of(family)
    expected = combinations.run(combinations.config_of(family, train__trainable=more["train__trainable"]), batch)
    sizes = {"model__layers_as": "scan", "parallel__pipe": 2, "train__microbatches": 4}
    found = combinations.run(combinations.config_of(family, **sizes, **more), batch)
    assert max(combinations.deviations(found, expected).values()) <= 2e-6


def test_dropout_drops_the_same_in_a_pipeline() -> None:
    batch, key = combinations.batch_of("gpt"), jax.random.key(7)
    same = {"model__dropout_frac": 0.3, "model__layers_as": "scan", "parallel__data": 2, "train__microbatches": 4}
    expected = combinations.run(combinations.config_of("gpt", **same), batch, key)
    found = combinations.run(combinations.config_of("gpt", parallel__pipe=2, parallel__schedule="zb_h1", **same), batch, key)
    assert max(combinations.deviations(found, expected).values()) <= 2e-6
    other = combinations.run(combinations.config_of("gpt", **same), batch, jax.random.key(8))
    assert abs(other.mean.total - expected.mean.total) > 1e-4 * expected.mean.total


def test_bfloat16_rounds_as_on_one_device() -> None:
    """No gradient is further from float32's than a few times what one device's is."""
    batch = combinations.batch_of("llama")
    exact = combinations.run(combinations.config_of("llama"), batch)
    one = combinations.config_of("llama", precision__compute="bfloat16")
    sizes = {"model__layers_as": "scan", "parallel__pipe": 2, "parallel__fsdp": 2, "train__microbatches": 4}
    many = combinations.config_of("llama", precision__compute="bfloat16", **sizes)
    (near, far) = (_distance(combinations.run(config, batch), exact) for config in (one, many))
    assert far["loss"] < 1e-3
    assert all(far[name] < max(2 * near[name], 0.02) for name in far), (near, far)


def _distance(found: Any, exact: Any) -> dict[str, float]:
    distances = {"loss": abs(found.mean.total - exact.mean.total) / exact.mean.total}
    for (name, a), (_, b) in zip(tree.named_leaves(found.gradients), tree.named_leaves(exact.gradients), strict=True):
        distances[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return distances
