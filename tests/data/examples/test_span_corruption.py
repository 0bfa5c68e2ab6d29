"""Span corruption: lengths, the sentinels, and that inputs and targets together are the row again."""

from collections import Counter
from math import comb

import numpy as np
import pytest
from specials import BOS, EOS, SENTINELS, Specials, made

from jaxllm.data.documents import Document
from jaxllm.data.examples import span_corruption
from jaxllm.data.examples.span_corruption import corrupted, solve
from jaxllm.data.shards import Totals


@pytest.mark.parametrize("noise_frac", [0.01, 0.15, 0.3, 0.5, 0.66])
@pytest.mark.parametrize("mean_span_tokens", [2.0, 3.0, 7.5])
def test_the_longest_row_that_fills_the_inputs(noise_frac: float, mean_span_tokens: float) -> None:
    """Against trying every length up to four times the inputs: exactly full, and no longer row would fit."""
    by_inputs: dict[int, int] = {}
    for raw in range(2, 1200):
        by_inputs[corrupted(raw, noise_frac, mean_span_tokens).inputs] = raw
    for width in range(3, 300):
        sizes = solve(width, noise_frac, mean_span_tokens)
        assert (sizes.inputs, sizes.raw) == (width, by_inputs[width])


@pytest.mark.parametrize(("width", "raw", "targets"), [(512, 568, 114), (1024, 1137, 229)])
def test_lengths_are_those_of_t5(width: int, raw: int, targets: int) -> None:
    """568 and 114 are the figures of T5's own pre-training with 512 inputs, 15 % and spans of 3."""
    sizes = solve(width, 0.15, 3.0)
    assert (sizes.raw, sizes.targets) == (raw, targets)


def corrupt(count: int, raw: np.ndarray | None = None, **data: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    side = made("span_corruption", "t5", **data)
    width = side.columns(50)["tokens"].width
    tokens = np.random.default_rng(0).integers(0, 26, (count, width)).astype(np.int32) if raw is None else raw
    return tokens, side.batch(Specials())({"tokens": tokens}, np.arange(count), 0, 0)


@pytest.mark.parametrize(
    "data",
    [{"row_tokens": 32}, {"row_tokens": 20, "noise_frac": 0.5, "mean_span_tokens": 2.0}, {"row_tokens": 3}, {"row_tokens": 9}],
)
def test_inputs_and_targets_are_the_row(data: dict[str, float]) -> None:
    tokens, batch = corrupt(200, **data)
    assert batch["inputs"].shape == (200, data["row_tokens"])
    for row, inputs, targets in zip(tokens, batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
        assert inputs[-1] == targets[-1] == EOS
        spans = np.split(targets[:-1], np.flatnonzero(np.isin(targets[:-1], SENTINELS)))[1:]
        assert [int(span[0]) for span in spans] == list(SENTINELS[: len(spans)]), "sentinels in order, from the top"
        assert all(len(span) > 1 for span in spans)
        hidden = {int(span[0]): span[1:].tolist() for span in spans}
        assert inputs[0] not in hidden, "a row begins with a span that stays"
        whole = [token for index in inputs[:-1] for token in hidden.pop(index, [index])]
        assert whole == row.tolist() and not hidden
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert (batch["tokens"][:, 0] == BOS).all()
    for name, side in (("input_segments", "inputs"), ("segments", "targets"), ("weights", "targets")):
        np.testing.assert_array_equal(batch[name], np.ones_like(batch[side]))
    for name in ("input_positions", "positions"):
        assert (batch[name] == np.arange(batch[name].shape[1])).all()


def test_every_way_of_cutting_is_as_likely() -> None:
    """12 tokens, 4 of them hidden in 2 spans: C(3, 1) cuts of the hidden times C(7, 1) of the others, 420 draws each, 5 deviations."""
    sizes = span_corruption.Sizes(12, 4, 2)
    number = span_corruption._cut(sizes, 0, 0, np.arange(8820))
    cuts = Counter(map(bytes, (number % 2).astype(np.uint8)))
    assert len(cuts) == comb(3, 1) * comb(7, 1)
    assert max(abs(count - 420) for count in cuts.values()) < 5 * np.sqrt(420)
    assert ((number % 2).sum(1) == 4).all() and (number.max(1) == 3).all()


def test_the_share_is_kept() -> None:
    tokens, batch = corrupt(50, row_tokens=64, mean_span_tokens=4.0)
    hidden = batch["targets"].shape[1] - 1 - np.isin(batch["targets"], SENTINELS).sum(1)
    assert hidden.tolist() == [round(0.15 * tokens.shape[1])] * 50


@pytest.mark.parametrize("block_tokens", [10, 1 << 20])
def test_rows_are_stretches_of_the_stream(block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents closed by eos, without bos; the last row ends with the stream, whatever block it falls into."""
    monkeypatch.setattr("jaxllm.data.pack.BLOCK_TOKENS", block_tokens)
    side, totals = made("span_corruption", "t5", row_tokens=8), Totals()
    width = side.columns(50)["tokens"].width
    texts = ["abc", "defgh", "", "ijklmnopq", "rs"]
    stream = [token for text in texts for token in [*Specials().encode(text), EOS]]
    blocks = list(side.pack((Document(text, "") for text in texts), Specials(), (), totals))
    tokens = np.concatenate([block["tokens"] for block in blocks])
    full = len(stream) // width
    assert len(stream) % width
    np.testing.assert_array_equal(tokens, [*np.reshape(stream[: full * width], (full, width)), stream[-width:]])
    assert totals.weighted_tokens == (full + 1) * side.arrays["targets"].width
    assert list(side.pack([Document("ab", "")], Specials(), (), Totals())) == [], "less than a row is none"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"row_tokens": 2}, "nothing can be hidden.\n  Accepted: rows of 3"),
        (
            {"noise_frac": 0.6, "mean_span_tokens": 1.0},
            "more hidden spans than tokens.*\n  Accepted: spans of more than 1.5 tokens",
        ),
        (
            {"noise_frac": 0.9, "mean_span_tokens": 20.0},
            r"make targets of \d+ tokens.\n  Accepted: up to model.context_tokens = 512",
        ),
    ],
)
def test_sizes_that_do_not_fit(data: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made("span_corruption", "t5", **data)
