"""Fine-tuning through the whole command: what is trained, what stays, what is kept of it, and that it goes on as if never stopped."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_training as tiny
from parallel import combinations
from random_run import write_run
from rich.console import Console

import jaxllm
from jaxllm import config as schema
from jaxllm import convert, evaluate, runs, start, train
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.errors import TrainingError
from jaxllm.engine.workdir import open_workdir
from jaxllm.transforms import adapt, tree

STEPS, RANK = 6, 2
PLAIN = {"optimizer__clip_norm": 0.0, "optimizer__weight_decay": 0.0}


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "beginning", model__name="llama", model__layers_as="scan")


def make_config(beginning: Path, **fields: Any) -> Any:
    config = schema.base()
    tiny = {
        "train__start": str(beginning),
        "train__transforms": ("lora",),
        "data__source": str(beginning / "text.jsonl"),
        "data__validation_frac": 0.4,
        "train__steps": STEPS,
        "train__batch_seqs": 4,
        "train__log_every_steps": 1,
        "train__ema_decay": 0.5,
        "lora__rank": RANK,
        "lora__dropout_frac": 0.1,
        "schedule__name": "constant",
        "schedule__warmup_steps": 0,
        "optimizer__learning_rate": 1e-2,
        "eval__every_steps": 3,
        "checkpoint__every_steps": 3,
        "sample__prompts": (),
        "model__layers_as": "scan",
        "parallel__data": 1,
    }
    for key, value in (tiny | fields).items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def run(config: Any, workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock, of a run in this process."""
    config = start.resolve(config, workdir)
    schema.check(config)
    with open_workdir(workdir) as opened:
        assert train.run(config, opened, Console(file=io.StringIO(), width=200)) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "secs")} for row in rows]


@pytest.fixture(scope="module")
def finished(beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(make_config(beginning), workdir)


def test_adapters_alone_are_trained(beginning: Path, finished: tuple[Path, list[dict[str, Any]]]) -> None:
    workdir, rows = finished
    losses = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert losses[-1] < losses[0]
    found, before = runs.load(workdir), runs.load(beginning)
    bases = {name.removesuffix("/base"): leaf for name, leaf in tree.named_leaves(found.params)}
    for name, leaf in tree.named_leaves(before.params):
        np.testing.assert_array_equal(bases[name], leaf, err_msg=name)
    trained = adapt.adapters(found.model.axes)
    assert len(trained) == 14 and all(np.any(np.asarray(bases[name]) != 0) for name in trained)
    numbers = 2 * RANK * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + found.model.config.mlp_width))
    record = Checkpoints(workdir / "checkpoints").record(STEPS)
    held: dict[str, int] = {}
    for name, leaf in record.leaves.items():
        kind = name.split("/")[0]
        held[kind] = held.get(kind, 0) + (math.prod(leaf.shape) if len(leaf.shape) > 0 else 0)
    # Two moments, and the average: of what is trained.
    assert (held["params"], held["opt_state"], held["ema"]) == (numbers, 2 * numbers, numbers)


def test_a_run_goes_on_as_if_never_stopped(beginning: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """To the bit, the dropout of adapters included; where it began may be gone."""
    moved = tmp_path / "beginning"
    moved.symlink_to(beginning)
    run(make_config(moved, train__steps=3, data__source=str(beginning / "text.jsonl")), tmp_path / "parts")
    moved.unlink()
    resumed = run(make_config(moved, data__source=str(beginning / "text.jsonl")), tmp_path / "parts")
    assert resumed == finished[1]


def test_what_reads_a_run_reads_one_with_adapters(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    workdir, rows = finished
    model, params, tokenizer = jaxllm.load(workdir)
    merged = tmp_path / "merged"
    assert convert.convert(workdir, merged, convert.RUN, None, Console(file=io.StringIO())) == 0
    plain = jaxllm.load(merged)
    said = [jaxllm.generate(*loaded, "The", max_new_tokens=5, temperature=0) for loaded in ((model, params, tokenizer), plain)]
    assert said[0] == said[1]
    expected = [row for row in rows if row["kind"] == "eval"][-1]["loss"]
    assert evaluate.evaluate_split(runs.load(workdir), "validation")["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_array_that_cannot_move_is_named(beginning: Path, tmp_path: Path) -> None:
    """A alone: while B is 0 it has no gradient. In the first step that is as it should be."""
    with pytest.raises(TrainingError, match="step 2 .* did not change 7 trainable .*: layers/attention/k/kernel/a, layers/"):
        run(make_config(beginning, train__trainable=".*/a"), tmp_path)


def test_a_rate_that_destroys_the_model_is_named(beginning: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="(?s)step 2 .* did not change .*and at the learning rate: "):
        run(make_config(beginning, optimizer__learning_rate=1e6), tmp_path)


def steps_of(count: int, **overrides: Any) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """(trained arrays by name before and after each step, metrics of each step)"""
    given = {"train__transforms": ("lora",), "lora__rank": RANK, "lora__lr_ratio": 16.0, **PLAIN, **overrides}
    training, step = tiny.make(**given), tiny.compiled(**given)
    state = training.create()
    arrays, rows = [dict(tree.named_leaves(jax.device_get(state.params)))], []
    for seed in range(count):
        state, metrics = step(state, training.place(tiny.batch(seed)))
        arrays.append(dict(tree.named_leaves(jax.device_get(state.params))))
        rows.append(jax.device_get(metrics))
    return arrays, rows


def test_b_learns_faster_by_the_ratio_and_a_does_not() -> None:
    """Adam's first update is the sign of the gradient; A's first one is the second, sqrt(1 + b2) / (1 + b1) long."""
    config = tiny.make().config.optimizer
    (start, first, second), rows = steps_of(2)
    for name in start:
        early, late = (np.abs(b[name] - a[name]).max() / config.learning_rate for a, b in ((start, first), (first, second)))
        if name.endswith("/b"):
            assert early == pytest.approx(16, rel=1e-3)
        else:
            assert early == 0 and late == pytest.approx(math.sqrt(1 + config.b2) / (1 + config.b1), rel=1e-3)
    assert rows[0]["moved"].tolist() == [name.endswith("/b") for name in start] and rows[1]["moved"].all()


def test_float16_follows_float32() -> None:
    _, (expected, _) = steps_of(2)
    arrays, (found, later) = steps_of(2, precision__compute="float16")
    assert later["finite"] and later["moved"].all() and {array.dtype.name for array in arrays[-1].values()} == {"float32"}
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-2)


def test_accumulation_is_exact_for_unequal_rows() -> None:
    one, many = (
        combinations.run(
            combinations.config_of("llama", model__layers=1, train__transforms=("dora",), lora__rank=4, train__microbatches=count),
            combinations.batch_of("llama"),
        )
        for count in (1, 8)
    )
    found = combinations.deviations(many, one)
    assert len(found) > 14 and max(found.values()) <= 1e-5, found


def test_nothing_is_computed_for_what_is_frozen() -> None:
    """Forward and back through each kernel, 4 of the 6 flops a parameter and token; also at the head, whose loss makes its own gradient."""
    shape = {"model__width": 64, "model__mlp_width": 256, "model__vocab_size": 256, "model__kv_heads": 4}
    adapted = {"train__transforms": ("lora",), "lora__rank": 1}
    full, lora, with_head = (
        tiny.compiled(**shape, **more).flops for more in ({}, adapted, adapted | {"lora__also": "head/kernel"})
    )
    assert lora < 4.2 / 6 * full
    # XLA counts the loop over chunks once.
    chunk = tiny.BASE["train.loss_chunk_tokens"]
    assert with_head - lora > 2 * chunk * 256 * 64
