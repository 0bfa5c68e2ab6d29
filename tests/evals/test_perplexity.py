"""Loss, perplexity and bits per byte: against NumPy on the logits of `apply`."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.data import examples, shards, tokenize
from jaxllm.data.documents import Document
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.evals import perplexity
from jaxllm.types import Model, Params

TEXTS = ["one", "a longer text, which goes over the end of a row or two", "äöü €", "x", "the last"]
ROW_TOKENS = 16


@cache
def made() -> tuple[Any, Model, Params]:
    """With z-loss and dropout on, of which an evaluation must show nothing."""
    settings = config.base()
    sizes = {"layers": 1, "width": 16, "heads": 2, "vocab_size": ByteTokenizer.vocab_size, "context_tokens": ROW_TOKENS}
    settings.model.update({**sizes, "dropout_frac": 0.5})
    settings.train.update({"z_loss": 0.1, "loss_chunk_tokens": 20})
    model = models.build(settings)
    return settings, model, jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))


@pytest.fixture
def rows(tmp_path: Any) -> shards.Shards:
    documents = [Document(text, "") for text in TEXTS]
    return examples.write(made()[0], tmp_path / "rows", documents, ByteTokenizer(), (), shards.Totals())


def batch_of(rows: shards.Shards, places: np.ndarray) -> dict[str, np.ndarray]:
    return examples.make(made()[0]).batch(ByteTokenizer())(rows.rows(places), places, 0, 0)


def batches(rows: shards.Shards, size: int) -> Iterator[dict[str, np.ndarray]]:
    """The last one is smaller."""
    for start in range(0, len(rows), size):
        yield batch_of(rows, np.arange(start, min(start + size, len(rows))))


def by_numpy(rows: shards.Shards) -> dict[str, float]:
    _, model, params = made()
    batch = batch_of(rows, np.arange(len(rows)))
    logits = jax.jit(model.apply)(params, batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    right = logits.argmax(-1) == batch["targets"]
    count, text_bytes = batch["weights"].sum(), sum(len(text.encode()) for text in TEXTS)
    total = (nll * batch["weights"]).sum()
    return {
        "loss": total / count,
        "perplexity": np.exp(total / count),
        "bits_per_byte": total / np.log(2) / text_bytes,
        "accuracy": (right * batch["weights"]).sum() / count,
        "tokens": count,
        "bytes": text_bytes,
    }


def test_equals_numpy_whatever_the_batch_size(rows: shards.Shards) -> None:
    """float32 logits of size 1 and sums of 100 terms: 1e-5 is far above rounding and far below any missing token."""
    settings, model, params = made()
    expected = by_numpy(rows)
    assert expected["tokens"] == expected["bytes"] + len(TEXTS), "every byte and every eos is predicted"
    evaluate = perplexity.make_eval(model, settings)
    for size in (len(rows), 2):
        row = evaluate(params, batches(rows, size), rows.bytes_per_token)
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-5, err_msg=name)


def test_nothing_to_evaluate_is_an_error(rows: shards.Shards) -> None:
    settings, model, params = made()
    evaluate = perplexity.make_eval(model, settings)
    empty = {**batch_of(rows, np.arange(2)), "weights": np.zeros((2, ROW_TOKENS), np.float32)}
    for given in ([empty], []):
        with pytest.raises(ValueError, match="nothing to evaluate: no target has a weight above 0"):
            evaluate(params, given, 1.0)


def test_metric_is_named_in_full() -> None:
    settings, *_ = made()
    name = perplexity.metric_name(settings, ByteTokenizer(), ROW_TOKENS)
    assert name == (
        "token perplexity (window 16, stride 16, BOS at document start, EOS at document end is predicted,"
        f" tokenizer bpe-259-{tokenize.fingerprint(ByteTokenizer())[:8]})"
    )


@pytest.mark.parametrize(
    ("objective", "fields", "start"),
    [
        ("masked_lm", {"whole_words": True}, "masked token perplexity (window 16, stride 16, 0.15 of the words chosen, tokenizer "),
        ("span_corruption", {}, "span corruption perplexity (inputs of 16, 0.15 of the tokens hidden in spans of 3, tokenizer "),
        ("prefix_lm", {}, "continuation perplexity (window 16, stride 16, behind a prefix of random length, tokenizer "),
        ("seq2seq", {"input_tokens": 8}, "target token perplexity (inputs up to 8, targets up to 16, EOS is predicted, tokenizer "),
        ("sequence_classification", {}, "perplexity of a text's class (3 classes, texts up to 16, tokenizer "),
    ],
)
def test_every_objective_has_a_name_of_its_own(objective: str, fields: dict[str, Any], start: str) -> None:
    settings = config.base()
    settings.train.objective, settings.model.classes = objective, 3
    settings.data.update(fields)
    assert perplexity.metric_name(settings, ByteTokenizer(), ROW_TOKENS).startswith(start)


def test_bits_per_byte_are_of_causal_models_alone(rows: shards.Shards) -> None:
    """Where a part of the text stands on both sides, predictions are no code of the text."""
    settings, model, params = made()
    settings = settings.copy_and_resolve_references()
    settings.train.objective = "prefix_lm"
    row = perplexity.make_eval(model, settings)(params, batches(rows, len(rows)), rows.bytes_per_token)
    assert (row["bits_per_byte"], row["bytes"]) == (None, None)
