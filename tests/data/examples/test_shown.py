"""Rows as a reader sees them: what is trained and what is not, special tokens by name, no character in halves."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from specials import EOS, SENTINELS, Specials, made

from jaxllm.data import tokenize
from jaxllm.data.examples import shown
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer


class Bytewise(ByteTokenizer):
    """As SentencePiece has it: each byte of a character that is not whole is a U+FFFD of its own."""

    def decode(self, ids: list[int]) -> str:
        text = bytes(index for index in ids if index < 256).decode("utf-8", "surrogateescape")
        return re.sub("[\\udc80-\\udcff]", "\ufffd", text)


BYTES = ByteTokenizer()


def row(*documents: tuple[list[int], list[bool]], padding: int = 0) -> dict[str, np.ndarray]:
    """Documents in a row, each of one token more than it has predictions, with which of these count."""
    tokens, targets, weights, segments = [], [], [], []
    for number, (ids, counts) in enumerate(documents):
        tokens += ids[:-1]
        targets += ids[1:]
        weights += counts
        segments += [number + 1] * len(counts)
    names = ("tokens", "targets", "weights", "segments")
    return {name: np.array([*each, *[0] * padding]) for name, each in zip(names, (tokens, targets, weights, segments), strict=True)}


def parts(arrays: dict[str, np.ndarray], tokenizer: ByteTokenizer = BYTES) -> list[tuple[str, list[tuple[str, bool | None]]]]:
    return [(part.title, list(map(tuple, part.pieces))) for part in shown.weighted(arrays, tokenizer, ())]


def test_trained_and_untrained_by_eye() -> None:
    """The second letter's accent is a byte of its own, and what follows it alone is trained: the letter stays whole."""
    ids = [BYTES.bos_id, *"h\u00e9 you".encode(), BYTES.eos_id, *b"me", BYTES.eos_id]
    counts = [False, False, True, True, True, True, True, True, False, False, True]
    found = parts(row((ids, counts), ([*b"ab"], [True]), ([*b"c!"], [False]), padding=2))
    assert found == [
        ("document 1, 12 tokens, 7 trained", [("<s>h\u00e9", False), (" you</s>", True), ("me", False), ("</s>", True)]),
        ("document 2, 2 tokens, 1 trained", [("ab", None)]),
        ("document 3, 1 tokens, 0 trained", [("c", False)]),
        ("padding, 2 tokens", []),
    ]


@pytest.mark.parametrize("tokenizer", [BYTES, Bytewise()], ids=["a mark a rest", "a mark a byte"])
@given(text=st.text(min_size=2, max_size=12), data=st.data())
def test_no_character_is_lost_or_halved(tokenizer: ByteTokenizer, text: str, data: st.DataObject) -> None:
    ids = [*text.encode("utf-8", "ignore"), BYTES.eos_id]
    counts = data.draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
    counts[-1] = True
    ((_, pieces),) = parts(row((ids, counts)), tokenizer)
    letters = [(letter, flag) for piece, flag in pieces for letter in piece]
    assert "".join(letter for letter, _ in letters) == text.encode("utf-8", "ignore").decode() + "</s>"
    place = 0
    for letter, flag in letters[: -len("</s>")]:
        assert flag is (None if all(counts) else [False, *counts][place])
        place += len(letter.encode())


def test_bytes_without_their_others_are_what_the_row_has() -> None:
    """A row may start inside a character, and what is behind it is not lost for that."""
    ((_, pieces),) = parts(row(([0xA9, *b" you", BYTES.eos_id], [False, True, True, True, True])))
    assert pieces == [("\ufffd ", False), ("you</s>", True)]


def test_special_tokens_have_names() -> None:
    with_all = ByteTokenizer(Added(mask=True, sentinels=2))
    assert tokenize.names(with_all, range(with_all.vocab_size)) == {256: "<s>", 257: "</s>", 258: "<pad>", 259: "<mask>"}
    assert tokenize.names(Specials(), [0, 1]) == {}


@pytest.mark.parametrize("objective", ["seq2seq", "span_corruption"])
def test_both_sides_of_a_pair_end_visibly(objective: str) -> None:
    side = np.array([0, 1, SENTINELS[0], EOS, 40])
    arrays = {"inputs": side, "targets": side, "input_segments": side != 40, "segments": side != 40}
    assert [piece.text for part in made(objective, "t5").show(arrays, Specials(), ()) for piece in part.pieces] == ["ab<eos>"] * 2
