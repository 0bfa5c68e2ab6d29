"""Pairs: packed so that nothing is lost or mixed, cut with a count, and read by the decoder one step later."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from specials import BOS, EOS, PAD, Specials, made

from jaxllm.data.documents import Document
from jaxllm.data.shards import Totals

TEXT = st.text(alphabet="abcdef", max_size=9)


def packed(pairs: list[tuple[str, str]], input_tokens: int, row_tokens: int) -> tuple[dict[str, np.ndarray], Totals]:
    side, totals = made("seq2seq", "t5", input_tokens=input_tokens, row_tokens=row_tokens), Totals()
    documents = (Document(text, "", target) for text, target in pairs)
    blocks = list(side.pack(documents, Specials(), (), totals))
    return {name: np.concatenate([block[name] for block in blocks]) for name in side.columns(50)}, totals


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=30), st.integers(4, 12), st.integers(4, 12))
def test_pairs_come_back(pairs: list[tuple[str, str]], input_tokens: int, row_tokens: int) -> None:
    """Each once, with equal segments on both sides, cut to the row where it is longer; `data/test_fill.py` tests where they come."""
    rows, totals = packed(pairs, input_tokens, row_tokens)
    expected = [
        ([*Specials().encode(text)[: input_tokens - 1], EOS], [*Specials().encode(target)[: row_tokens - 1], EOS])
        for text, target in pairs
    ]
    found = []
    for row in range(len(rows["inputs"])):
        for number in range(1, rows["segments"][row].max() + 1):
            inputs, targets = rows["input_segments"][row] == number, rows["segments"][row] == number
            found.append((rows["inputs"][row][inputs].tolist(), rows["targets"][row][targets].tolist()))
        assert rows["segments"][row].max() == rows["input_segments"][row].max() > 0
    assert sorted(found) == sorted(expected)
    assert (rows["inputs"][rows["input_segments"] == 0] == PAD).all() and (rows["targets"][rows["segments"] == 0] == PAD).all()
    assert totals.documents == len(pairs)
    assert totals.cut == sum(len(text) >= input_tokens or len(target) >= row_tokens for text, target in pairs)
    assert totals.weighted_tokens == sum(len(targets) for _, targets in expected)
    assert totals.tokens == totals.weighted_tokens + sum(len(inputs) for inputs, _ in expected)


def test_a_row_by_eye() -> None:
    rows, _ = packed([("ab", "cde"), ("f", "")], 8, 7)
    batch = made("seq2seq", "t5", input_tokens=8, row_tokens=7).batch(Specials())(rows, np.arange(1), 0, 0)
    expected = {
        "inputs": [0, 1, EOS, 5, EOS, PAD, PAD, PAD],
        "input_segments": [1, 1, 1, 2, 2, 0, 0, 0],
        "input_positions": [0, 1, 2, 0, 1, 0, 1, 2],
        "tokens": [BOS, 2, 3, 4, BOS, PAD, PAD],
        "targets": [2, 3, 4, EOS, EOS, PAD, PAD],
        "segments": [1, 1, 1, 1, 2, 0, 0],
        "positions": [0, 1, 2, 3, 0, 0, 1],
        "weights": [1, 1, 1, 1, 1, 0, 0],
    }
    assert batch.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)
