"""The schema, its errors and its files."""

import pytest

from jaxllm import config


def test_base_passes_and_survives_json() -> None:
    given = config.base()
    config.check(given)
    given.optimizer.groups = (("embed/.*", 0.5, 0.0), (".*bias", 1.0, 0.0))
    given.sample.prompts = ("a", "b")
    assert config.from_json(config.to_json(given)) == given


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.layers", 0, "model.layers = 0 .*\n  Accepted: 1 or more"),
        ("model.heads", 3, "model.heads = 3 does not divide model.width = 256"),
        ("model.kv_heads", 3, "model.kv_heads = 3 does not divide model.heads = 4.\n  Accepted: 1, 2, 4"),
        ("model.name", "lama", "Accepted: bert, gpt, llama"),
        ("model.dropout_frac", 1.0, "Accepted: from 0 to 0.9"),
        ("train.microbatches", 3, "train.microbatches = 3 does not divide train.batch_seqs = 16"),
        ("data.row_tokens", 512, "data.row_tokens = 512 is more than model.context_tokens = 256"),
        ("data.source", "", "data.source is empty"),
        ("data.cleaners", ("unicod",), "Accepted: a tuple of: control, min_chars, unicode, whitespace"),
        ("tokenizer.kind", "file", "tokenizer.path"),
        ("data.validation_frac", 0.0, "nothing to evaluate on"),
        ("parallel.fsdp", -1, "parallel.data and parallel.fsdp are -1"),
        ("parallel.fsdp", 0, "Accepted: -1"),
        ("optimizer.groups", (("embed", 1.0),), "pattern, learning-rate factor, weight-decay factor"),
        ("optimizer.groups", (("*embed", 1.0, 1.0),), "a tuple of .pattern"),
        ("lora.targets", "*foo(", "Accepted: a regular expression"),
        ("train.trainable", "[a", "Accepted: a regular expression"),
        ("optimizer.learning_rate", float("nan"), "more than 0"),
    ],
)
def test_bad_values_are_named(key: str, value: object, words: str) -> None:
    given = config.base()
    section, _, name = key.rpartition(".")
    with given.unlocked():
        given[section][name] = value
    with pytest.raises(ValueError, match=words):
        config.check(given)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.layer", "model.layers"),
        ("modle.layers", "model.layers"),
        ("lr", None),
        ("optimizer.leraning_rate", "optimizer.learning_rate"),
    ],
)
def test_unknown_keys_get_the_closest(key: str, near: str | None) -> None:
    text = config.unknown_key(key)
    assert text.startswith(f"unknown config key '{key}'")
    assert (f"Did you mean '{near}'?" in text) == (near is not None)
    assert "Accepted: " in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"model": {"layer": 3}}',
            r"unknown config key 'model.layer'. Did you mean 'model.layers'\?\n  Accepted: .*\n  Correct it",
        ),
        ('{"model": {"layers": "x"}}', r"model.layers = 'x' is not of type int \(transformer blocks\).\n  Accepted: 1 or more"),
        ('{"model": 3}', "unknown config key 'model'"),
        ('{"model": ', r"no JSON: .*\n  Accepted: what a run wrote"),
        ("[1]", r"a list instead of a JSON object.\n  Accepted: a run's config.json"),
    ],
)
def test_json_that_is_no_config_is_an_error(text: str, words: str, tmp_path) -> None:  # noqa: ANN001
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {words}"):
        config.load(path)


def test_an_open_vocabulary_is_filled_in_a_copy() -> None:
    given = config.base()
    filled = config.with_vocabulary(given, 100)
    assert (given.model.vocab_size, filled.model.vocab_size, config.with_vocabulary(filled, 7).model.vocab_size) == (0, 100, 100)
    with pytest.raises(AttributeError):
        filled.model.vocabulary = 3


def test_missing_config_file_is_an_error(tmp_path) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="no config at"):
        config.load(tmp_path / "nothing.py")


def test_type_changes_are_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        config.base().train.steps = "many"
