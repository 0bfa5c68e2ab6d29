"""All objectives from text to batches on a mesh: what config promises, what resuming needs, what is kept, what goes wrong."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from corpus import Lines, document
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.data import examples, loader
from jaxllm.data.mixture import Batches
from jaxllm.data.prepare import Prepared, load, prepare
from jaxllm.engine.step import abstract_batch
from jaxllm.parallel import plan

MODELS = {
    "causal_lm": "llama",
    "prefix_lm": "gpt",
    "masked_lm": "bert",
    "span_corruption": "t5",
    "seq2seq": "transformer",
    "sequence_classification": "bert",
    "sft": "gpt",
    "token_classification": "llama",
}
NOISY = ("prefix_lm", "masked_lm", "span_corruption")
LABELS = ("left", "right", "up")


def row(number: int) -> dict[str, Any]:
    words = document(number).split()
    return {
        "text": document(number),
        "answer": f"answer {number}",
        "other": "more " * (number % 3 + 1),
        "label": LABELS[number % 3],
        "words": words,
        "tags": [LABELS[len(word) % 3] for word in words],
    }


def config_of(folder: Path, objective: str, **changes: Any) -> ConfigDict:
    """40 rows; keywords are fields with __ for the dot."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
    config = schema.base()
    config.train.objective, config.model.name = objective, MODELS[objective]
    config.model.head = {"sequence_classification": "classify", "token_classification": "tag"}.get(objective, "lm")
    config.model.context_tokens, config.train.batch_seqs, config.tokenizer.kind = 32, 8, "byte"
    config.chat.template = "plain"
    config.data.update({"source": str(source), "validation_frac": 0.2})
    target = {"seq2seq": "answer", "sft": "answer", "sequence_classification": "label", "token_classification": "tags"}
    config.data.target_field = target.get(objective, "target")
    config.data.pair_field = "other" if objective == "sequence_classification" else ""
    config.data.text_field = {"token_classification": "words", "sft": "label"}.get(objective, "text")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    schema.check(config)
    return config


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, Prepared]:
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(folder, request.param)
    return config, prepare(config, folder / "data", log=Lines())


def sharding_of(devices: int) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("data"))


def source_of(case: tuple[ConfigDict, Prepared], devices: int) -> loader.Loader:
    config, prepared = case
    return loader.make(Batches(prepared.train, prepared.make_batch(config), 8, config.seed), sharding_of(devices))


def test_batches_are_what_the_step_is_compiled_for(case: tuple[ConfigDict, Prepared]) -> None:
    config, prepared = case
    expected = abstract_batch(config, plan.make(config, jax.devices()[:1]))
    with source_of(case, 1) as source:
        batch = source.batch(0)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in expected.items()
    }
    weights, segments, targets = (np.asarray(batch[name]) for name in ("weights", "segments", "targets"))
    assert weights.sum() > 0 and not weights[segments == 0].any()
    most = len(prepared.labels) or prepared.tokenizer.vocab_size
    assert targets.min() >= 0 and targets[weights > 0].max() < most
    assert examples.make(config).tokens_a_row == sum(
        array.shape[1] for name, array in batch.items() if name in ("tokens", "inputs")
    )
    assert prepared.train.weighted_tokens > 0
    assert (prepared.train.bytes_per_token > 0) == (config.train.objective in ("causal_lm", "prefix_lm"))


def test_what_is_reported_as_filled_is(case: tuple[ConfigDict, Prepared]) -> None:
    config, prepared = case
    for split in (prepared.train, prepared.validation):
        rows = np.arange(len(split))
        batch = prepared.make_batch(config)(split.rows(rows), rows, 0, 0)
        segments = [array for name, array in batch.items() if name.endswith("segments")]
        assert split.filled_frac == np.concatenate([(array > 0).ravel() for array in segments]).mean()
        assert split.positions == sum(array.size for array in segments)


def test_a_resumed_run_on_other_devices_sees_the_same(case: tuple[ConfigDict, Prepared]) -> None:
    """Steps asked in another order, by a new loader, over 1 or 8 devices: bit-equal. And another step or seed has new noise."""
    with source_of(case, 1) as source:
        before = [jax.device_get(source.batch(step)) for step in range(4)]
    with source_of(case, 8) as source:
        for step in (2, 3, 0):
            for name, array in jax.device_get(source.batch(step)).items():
                np.testing.assert_array_equal(array, before[step][name], err_msg=name)
    config, prepared = case
    make_batch, rows = prepared.make_batch(config), np.arange(8) % len(prepared.train)
    stored = prepared.train.rows(rows)
    one = make_batch(stored, rows, 0, 0)
    for seed, step in ((0, 1), (1, 0)):
        other = make_batch(stored, rows, seed, step)
        assert any((one[name] != other[name]).any() for name in one) == (config.train.objective in NOISY)
    # In another order, and in smaller batches, which is what another host makes.
    for part in (rows[::-1], rows[3:5], rows[7:]):
        again = make_batch(prepared.train.rows(part), part, 0, 0)
        for place, index in enumerate(part):
            for name in one:
                np.testing.assert_array_equal(again[name][place], one[name][int(np.flatnonzero(rows == index)[0])], err_msg=name)


def test_evaluations_see_the_same_noise(case: tuple[ConfigDict, Prepared]) -> None:
    config, prepared = case
    sweeps = [
        list(loader.sweep(prepared.validation, prepared.make_batch(config), batch_seqs, sharding_of(devices)))
        for batch_seqs, devices in ((8, 1), (8, 8), (4, 2))
    ]
    wholes = [{name: np.concatenate([batch[name] for batch in sweep]) for name in sweep[0]} for sweep in sweeps]
    count = len(prepared.validation)
    for whole in wholes[1:]:
        for name, array in wholes[0].items():
            np.testing.assert_array_equal(whole[name][:count], array[:count], err_msg=name)
    assert not any(array[count:].any() for array in wholes[0].values()), "rows that fill the last batch are 0"


def test_loaded_data_is_the_same_and_fresh(case: tuple[ConfigDict, Prepared]) -> None:
    config, prepared = case
    lines = Lines()
    again = prepare(config, prepared.directory, log=lines)
    assert lines == []
    assert again.labels == prepared.labels == load(config, prepared.directory).labels
    assert again.labels == (LABELS if config.model.head in ("classify", "tag") else ())
    again.train.verify()


def test_changes_of_noise_leave_the_rows_and_changes_of_rows_do_not(tmp_path: Path) -> None:
    for objective, key, stale in (
        ("masked_lm", "data__noise_frac", False),
        ("masked_lm", "data__whole_words", False),
        ("span_corruption", "data__mean_span_tokens", True),
        ("sequence_classification", "data__pair_field", True),
        ("seq2seq", "data__input_tokens", True),
    ):
        config = config_of(tmp_path, objective)
        prepare(config, tmp_path / objective, log=Lines())
        value = {"noise_frac": 0.3, "whole_words": True, "mean_span_tokens": 2.0, "pair_field": "", "input_tokens": 20}
        changed = config_of(tmp_path, objective, **{key: value[key.partition("__")[2]]})
        lines = Lines()
        prepare(changed, tmp_path / objective, log=lines)
        assert bool(lines) == stale, (objective, key)
    config = config_of(tmp_path, "causal_lm")
    prepare(config, tmp_path / "data", log=Lines())
    lines = Lines()
    prepare(config_of(tmp_path, "prefix_lm"), tmp_path / "data", log=lines)
    assert lines == [], "prefixes are drawn from the rows of causal_lm"
    prepare(config_of(tmp_path, "masked_lm"), tmp_path / "data", log=lines)
    assert "rows was None and is 'masked_lm'" in lines[0]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "unigram"])
@pytest.mark.parametrize("objective", ["masked_lm", "span_corruption", "seq2seq"])
def test_a_trained_tokenizer_gets_what_the_objective_needs(tmp_path: Path, kind: str, objective: str) -> None:
    config = config_of(tmp_path, objective, tokenizer__kind=kind, tokenizer__vocab_size=290)
    made = prepare(config, tmp_path / "data", log=Lines()).tokenizer
    assert (made.mask_id is not None) == (objective == "masked_lm")
    assert len(made.sentinel_ids) == (examples.make(config).added.sentinels if objective == "span_corruption" else 0)
    if objective == "span_corruption":
        assert made.sentinel_ids[0] == made.vocab_size - 1
    assert objective == "masked_lm" or made.eos_id is not None


def test_long_examples_are_counted(tmp_path: Path) -> None:
    lines = Lines()
    prepared = prepare(config_of(tmp_path, "seq2seq", data__row_tokens=5), tmp_path / "data", log=lines)
    assert prepared.train.cut == prepared.train.documents == prepared.record["splits"]["train"]["cut"]
    assert "documents were longer than a row and are cut (data.row_tokens, data.input_tokens)" in lines.text


BAD = {
    "plain text": ("seq2seq", {"data__source": "python_docs"}, "'python_docs' is text alone.*data.target_field.*sequences:copy"),
    "no field": (
        "seq2seq",
        {"data__target_field": "answr"},
        r"has no field 'answr'.*Accepted: text, answer.*Set data.target_field",
    ),
    "a list for a label": ("sequence_classification", {"data__target_field": "tags"}, "field 'tags' holds an array, not a label"),
    "one label for all words": (
        "token_classification",
        {"data__target_field": "label"},
        "has 5 words in 'words' and 1 labels in 'label'",
    ),
    "another number": (
        "sequence_classification",
        {"model__classes": 5},
        "model.classes = 5, but the training data has 3 different labels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(tmp_path: Path, name: str) -> None:
    objective, changes, words = BAD[name]
    config = config_of(tmp_path, objective, **changes)
    with pytest.raises(ValueError, match=f"(?s){words}") as caught:
        schema.with_classes(config, len(prepare(config, tmp_path / "data", log=Lines()).labels))
    assert "\n  Accepted: " in str(caught.value)


def test_labels_that_only_validation_has(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sequence_classification")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row(0) | {"label": "down"}) + "\n")
    config.data.validation_source = str(other)
    with pytest.raises(ValueError, match=r"labels that the training data lacks: down\.\n  Accepted: left, right, up\."):
        prepare(config, tmp_path / "data", log=Lines())


def test_classes_are_filled_in() -> None:
    config = schema.base()
    assert schema.with_classes(config, 3).model.classes == 3
    assert config.model.classes == 0
    assert schema.with_classes(config, 0).model.classes == 0
    config.model.classes = 3
    assert schema.with_classes(config, 3).model.classes == 3
