"""Prefixes: where they end, what they weigh, and how their lengths are spread."""

import numpy as np
from specials import Specials, made

# Three documents: of 5 tokens with 4 predictions, of 1 token, of 6 tokens with 6 predictions (it goes on in the next row); padding.
SEGMENTS = [1] * 5 + [2] + [3] * 6
WEIGHTS = [1] * 4 + [0, 0] + [1] * 6


def batches(count: int) -> dict[str, np.ndarray]:
    rows = {
        "tokens": np.tile(np.arange(13, dtype=np.int32), (count, 1)),
        "segments": np.tile(np.array(SEGMENTS, np.int32), (count, 1)),
        "weights": np.tile(np.array(WEIGHTS, np.int32), (count, 1)),
    }
    return made("prefix_lm", "gpt", row_tokens=12).batch(Specials())(rows, np.arange(count), 0, 0)


def test_the_first_prediction_is_the_first_token_after_the_prefix() -> None:
    made_rows = batches(500)
    causal = made("causal_lm", "gpt", row_tokens=12).batch(Specials())
    for name in ("tokens", "targets", "segments", "positions"):
        stored = {"tokens": made_rows["tokens"], "segments": made_rows["segments"], "weights": made_rows["weights"]}
        stored["tokens"] = np.pad(stored["tokens"], ((0, 0), (0, 1)), constant_values=12).astype(np.int32)
        np.testing.assert_array_equal(made_rows[name], causal(stored, np.arange(500), 0, 0)[name], err_msg=name)
    assert made_rows["prefix"].dtype == np.bool_
    for prefix, weights in zip(made_rows["prefix"], made_rows["weights"], strict=True):
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            length = int(prefix[start:stop].sum())
            assert length >= 1
            assert prefix[start : start + length].all(), "a prefix is the start of its document"
            expected = [given * (place >= length - 1) for place, given in enumerate(WEIGHTS[start:stop])]
            assert weights[start:stop].tolist() == expected
        assert weights[:5].any() and weights[6:].any(), "each document that had predictions keeps one"


def test_lengths_are_uniform() -> None:
    """From 1 to the number of predictions: 4 and 6 lengths, 6,000 draws, bounds of 5 deviations; documents are drawn by themselves."""
    made_rows = batches(6000)
    lengths = [made_rows["prefix"][:, start:stop].sum(1) for start, stop in ((0, 5), (6, 12))]
    for drawn, most in zip(lengths, (4, 6), strict=True):
        counts = np.bincount(drawn, minlength=most + 1)[1:]
        assert len(counts) == most
        assert abs(counts - 6000 / most).max() < 5 * np.sqrt(6000 / most)
    assert abs(np.corrcoef(*lengths)[0, 1]) < 5 / np.sqrt(6000)


def test_padding_is_no_prefix() -> None:
    rows = {"tokens": np.zeros((1, 13), np.int32), "segments": np.zeros((1, 12), np.int32), "weights": np.zeros((1, 12), np.int32)}
    made_rows = made("prefix_lm", "gpt", row_tokens=12).batch(Specials())(rows, np.arange(1), 0, 0)
    assert not made_rows["prefix"].any() and not made_rows["weights"].any()
