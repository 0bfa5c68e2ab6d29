"""The unigram baseline against counts by hand, for targets that are stored and for targets that noise chooses."""

import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxllm import config
from jaxllm.data import examples, loader, shards
from jaxllm.data.documents import Document
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.evals import baseline

TRAIN = ["abracadabra", "a man, a plan, a canal", "xyz", "banana " * 9]
OTHER = ["an apple a day", "zzzz", "never seen: ÄÖÜ " * 4]


def settings(objective: str) -> ConfigDict:
    made = config.base()
    made.model.update({"name": {"masked_lm": "bert", "span_corruption": "t5"}.get(objective, "llama"), "context_tokens": 16})
    made.train.objective = objective
    return made


def write(objective: str, texts: list[str], path: Path) -> tuple[shards.Shards, ByteTokenizer]:
    made = settings(objective)
    tokenizer = ByteTokenizer(examples.make(made).added)
    documents = [Document(text, "", target=str(len(text) % 2)) for text in texts]
    return examples.write(made, path, documents, tokenizer, ("0", "1"), shards.Totals()), tokenizer


def by_hand(seen: Counter[int], targets: Counter[int], outcomes: int) -> baseline.Baseline:
    nll = sum(number * -math.log((seen[target] + 1) / (seen.total() + outcomes)) for target, number in targets.items())
    likeliest = max(range(outcomes), key=lambda outcome: seen[outcome])
    return baseline.Baseline(nll / targets.total(), targets[likeliest] / targets.total())


def targets(objective: str, rows: shards.Shards, tokenizer: ByteTokenizer) -> Counter[int]:
    """Those that count, in the batches that a model is evaluated on."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found: Counter[int] = Counter()
    for batch in loader.sweep(rows, examples.make(settings(objective)).batch(tokenizer), 2, device):
        found.update(np.asarray(batch["targets"])[np.asarray(batch["weights"]) > 0].tolist())
    return found


@pytest.mark.parametrize("objective", ["causal_lm", "masked_lm", "span_corruption", "sequence_classification"])
def test_is_the_count_of_what_a_model_is_evaluated_on(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "BLOCK_ROWS", 3)
    (train, tokenizer), (other, _) = write(objective, TRAIN, tmp_path / "train"), write(objective, OTHER, tmp_path / "other")
    outcomes = 2 if objective == "sequence_classification" else tokenizer.vocab_size
    seen, wanted = targets(objective, train, tokenizer), targets(objective, other, tokenizer)
    if objective == "causal_lm":
        # Each byte and each end of a text is predicted.
        assert wanted == Counter(b"".join(text.encode() for text in OTHER)) + Counter({tokenizer.eos_id: len(OTHER)})
    found = baseline.measure(train, other, examples.make(settings(objective)).batch(tokenizer), outcomes)
    expected = by_hand(seen, wanted, outcomes)
    assert wanted
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0 <= found.accuracy <= 1


def test_frequencies_of_a_large_data_set_are_those_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, tokenizer = write("causal_lm", TRAIN, tmp_path / "train")
    make_batch = examples.make(settings("causal_lm")).batch(tokenizer)
    spaced = np.arange(3) * len(train) // 3
    batch = make_batch(train.rows(spaced), spaced, 0, 0)
    seen = Counter(batch["targets"][batch["weights"] > 0].tolist())
    monkeypatch.setattr(baseline, "MOST_ROWS", 3)
    found = baseline.measure(train, train, make_batch, 259)
    assert found == pytest.approx(by_hand(seen, targets("causal_lm", train, tokenizer), 259), rel=1e-12)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no target has a weight above 0.\n  Accepted: "):
        baseline.score(np.ones(3), np.zeros(3))
    assert baseline.score(np.zeros(4), np.ones(4)) == (pytest.approx(math.log(4)), 0.25)
