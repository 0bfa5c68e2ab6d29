"""Packing against an oracle that writes every row token by token, and what has to hold whatever the texts are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import LetterTokenizer

from jaxllm.data import pack
from jaxllm.data.examples.contract import count_positions
from jaxllm.data.shards import Block, Totals

TEXTS = st.lists(st.text(alphabet="abcdefghij", max_size=12), max_size=12)


def packed(texts: list[str], tokenizer: LetterTokenizer, row_tokens: int) -> tuple[Block, Totals]:
    totals = Totals()
    blocks = list(pack.pack(iter(texts), tokenizer, row_tokens, totals))
    widths = {"tokens": row_tokens + 1, "segments": row_tokens, "weights": row_tokens}
    empty = {name: np.zeros((0, width), int) for name, width in widths.items()}
    return {name: np.concatenate([block[name] for block in (empty, *blocks)]) for name in widths}, totals


def oracle(texts: list[str], tokenizer: LetterTokenizer, row_tokens: int) -> Block:
    """One token after the other: a row ends when it is full, and the next one starts with its last token."""
    stream = []
    for document, text in enumerate(texts):
        ids = [tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(text)
        stream += [(token, document) for token in ids + [tokenizer.eos_id] * (tokenizer.eos_id is not None)]
    rows = []
    start = 0
    while len(stream) - start > 1:
        row = stream[start : start + row_tokens + 1]
        rows.append(row + [(tokenizer.pad_id, None)] * (row_tokens + 1 - len(row)))
        start += row_tokens
    tokens, segments, weights = [], [], []
    for row in rows:
        numbers: list[int] = []
        seen: list[int] = []
        for _, document in row:
            if document is not None and document not in seen:
                seen.append(document)
            numbers.append(0 if document is None else seen.index(document) + 1)
        tokens.append([token for token, _ in row])
        segments.append(numbers[:-1])
        weights.append([int(a == b != 0) for a, b in zip(numbers, numbers[1:], strict=False)])
    shape = (len(rows), row_tokens)
    return {
        "tokens": np.reshape(tokens, (len(rows), row_tokens + 1)),
        "segments": np.reshape(segments, shape).astype(int),
        "weights": np.reshape(weights, shape).astype(int),
    }


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.booleans(), st.booleans(), st.integers(1, 9), st.integers(1, 40))
def test_packing_equals_the_oracle(texts: list[str], bos: bool, eos: bool, row_tokens: int, block_tokens: int) -> None:
    """Rows, segments and weights, however the stream is cut into blocks; and every token but a first one is predicted once."""
    tokenizer = LetterTokenizer(bos, eos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "BLOCK_TOKENS", block_tokens)
        patch.setattr(pack, "BATCH_CHARS", block_tokens)
        block, totals = packed(texts, tokenizer, row_tokens)
    for name, expected in oracle(texts, tokenizer, row_tokens).items():
        np.testing.assert_array_equal(block[name], expected, err_msg=name)

    lengths = [len(text) + bos + eos for text in texts]
    assert totals.documents == len(texts)
    assert totals.tokens == sum(lengths)
    assert block["weights"].sum() == totals.weighted_tokens == sum(max(length - 1, 0) for length in lengths)
    assert totals.text_bytes == sum(len(text) if bos else max(len(text) - 1, 0) for text in texts)
    predicted = block["tokens"][:, 1:][block["weights"].astype(bool)]
    ids = [[30] * bos + tokenizer.encode(text) + [31] * eos for text in texts]
    np.testing.assert_array_equal(predicted, [token for document in ids for token in document[1:]])


def test_a_row_by_eye() -> None:
    """Two documents and the start of a third one in a row of 8; the third goes on in the next row with the overlap token."""
    block, _ = packed(["abc", "d", "efgh"], LetterTokenizer(bos=True, eos=False), 8)
    np.testing.assert_array_equal(block["tokens"], [[30, 0, 1, 2, 30, 3, 30, 4, 5], [5, 6, 7, 29, 29, 29, 29, 29, 29]])
    np.testing.assert_array_equal(block["segments"], [[1, 1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(block["weights"], [[1, 1, 1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(count_positions(block["segments"])[:, :4], [[0, 1, 2, 3], [0, 1, 2, 0]])
    np.testing.assert_array_equal(count_positions(block["segments"])[0, 4:], [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("text", "bos", "bytes_"),
    [("éa", True, 3), ("éa", False, 2), ("aé", False, 2), ("ééb", False, 4), ("", False, 0)],
)
def test_text_bytes_are_those_of_predicted_text(text: str, bos: bool, bytes_: int) -> None:
    """Without bos nothing predicts the first id, so its bytes do not count: one of the two of an é that two ids share."""
    assert packed([text], LetterTokenizer(bos, eos=True), 4)[1].text_bytes == bytes_


def test_memory_does_not_grow_with_the_text() -> None:
    """Blocks come while texts are read: the reader is never more than a batch and a block ahead. One long text gives many blocks."""
    read = 0

    def texts() -> object:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "abcdefghij" * 10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "BLOCK_TOKENS", 1000)
        patch.setattr(pack, "BATCH_CHARS", 500)
        first = next(pack.pack(texts(), LetterTokenizer(True, True), 16, Totals()))
        assert read <= 15
        whole = list(pack.pack(["abcdefghij" * 1000], LetterTokenizer(True, True), 16, Totals()))
    assert len(first["tokens"]) == 1000 // 16
    assert [len(block["tokens"]) for block in whole] == [62] * 10 + [5, 1]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="ids from 30 to 31.\n  Accepted: 0 to 9"):
        packed([""], LetterTokenizer(True, True, vocab_size=10), 4)
