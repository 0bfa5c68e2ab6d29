"""Masking: what is chosen, what stands there, and how often, over many draws."""

import numpy as np
import pytest
from specials import BOS, EOS, MASK, PAD, Borderless, Specials, made, stored

from jaxllm.data.documents import Document
from jaxllm.data.shards import Totals

WIDTH = 64
ROW = [BOS, *(list(range(1, 26)) * 3)[: WIDTH - 6], EOS, PAD, PAD, PAD, PAD]
SEGMENTS = [1] * (WIDTH - 4) + [0] * 4


def draws(count: int, noise_frac: float = 0.15, **data: object) -> dict[str, np.ndarray]:
    """The same row `count` times, each with its own number, at 20 steps."""
    batch = made("masked_lm", noise_frac=noise_frac, **data).batch(Specials())
    rows = stored(*[ROW] * count, segments=[SEGMENTS] * count)
    parts = [batch(rows, np.arange(count), 1, step) for step in range(20)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("noise_frac", [0.15, 0.4])
def test_shares_of_devlin(noise_frac: float) -> None:
    """2,000 rows with 58 letters: 116,000 choices, and of the chosen 80 % masked, 10 % random, 10 % kept. Bounds are 5 deviations."""
    made_rows = draws(100, noise_frac)
    chosen = made_rows["weights"] == 1
    assert set(np.unique(made_rows["weights"])) == {0, 1}
    letters = np.isin(made_rows["targets"], np.arange(27))
    np.testing.assert_array_equal(made_rows["targets"], [ROW] * 2000)
    assert not chosen[~letters].any(), "special tokens and padding are never chosen"
    count = letters.sum()
    assert abs(chosen.sum() / count - noise_frac) < 5 * np.sqrt(noise_frac * (1 - noise_frac) / count)
    seen, true = made_rows["tokens"][chosen], made_rows["targets"][chosen]
    masked, same = (seen == MASK).mean(), (seen == true).mean()
    deviation = np.sqrt(0.16 / chosen.sum())
    assert abs(masked - 0.8) < 5 * deviation
    # A random token is the right one once in 40: ids 27 to 39 are ordinary, too.
    assert abs(same - (0.1 + 0.1 / 40)) < 5 * deviation
    others = seen[(seen != MASK) & (seen != true)]
    assert others.max() < 40, "no special token is put in"
    counts = np.bincount(others, minlength=40)
    assert abs(counts - others.size / 40).max() < 6 * np.sqrt(others.size / 40)
    np.testing.assert_array_equal(made_rows["tokens"][~chosen], made_rows["targets"][~chosen])
    # Each place of the row is chosen as often as the others.
    places = chosen[:, 1:-5].mean(0)
    assert abs(places - noise_frac).max() < 5 * np.sqrt(noise_frac * (1 - noise_frac) / 2000)


def test_without_a_pad_token_every_id_may_be_chosen() -> None:
    """Where the pad id is that of a letter, that letter is text like the others, and padding is not."""
    batch = made("masked_lm", noise_frac=0.9).batch(Borderless())
    rows = batch(stored([0] * 400, segments=[[1] * 200 + [0] * 200]), np.array([0]), 0, 0)
    assert rows["weights"][0, :200].sum() > 150
    assert not rows["weights"][0, 200:].any() and not rows["tokens"][0, 200:].any()


def test_whole_words() -> None:
    """Words of 1 to 9 letters: all of a word or none, each with the same chance, about the same share of the tokens."""
    text = " ".join("abcdefghi"[: 1 + number % 9] for number in range(40))
    ids = [BOS, *Specials().encode(text), EOS]
    second = ids.index(26, 100) + 4
    segments = [1] * second + [2] * (len(ids) - second)
    batch = made("masked_lm", whole_words=True).batch(Specials())
    parts = [batch(stored(ids, segments=[segments]), np.array([0]), 0, step) for step in range(2000)]
    chosen = np.concatenate([part["weights"] for part in parts]) > 0
    borders = [0, 1, *(place for place, token in enumerate(ids) if token == 26), second, len(ids) - 1, len(ids)]
    borders = sorted(set(borders))
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        word = chosen[:, start:stop]
        assert (word.all(1) == word.any(1)).all(), ids[start:stop]
        if ids[start] not in (BOS, EOS):
            assert abs(word[:, 0].mean() - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 2000)
    assert (chosen[:, second - 1] != chosen[:, second]).any(), "another document is another word"
    kinds = np.concatenate([part["tokens"] for part in parts])[chosen] == MASK
    assert abs(kinds.mean() - 0.8) < 0.02, "what stands there is decided token by token"


def test_rows_are_cut_without_overlap() -> None:
    """Every token of every document is in one row, with bos and eos, and only the last row is padded."""
    side, totals = made("masked_lm", row_tokens=8), Totals()
    documents = [Document(text, "") for text in ("abc", "defghijkl", "m")]
    blocks = list(side.pack(documents, Specials(), (), totals))
    tokens = np.concatenate([block["tokens"] for block in blocks])
    segments = np.concatenate([block["segments"] for block in blocks])
    np.testing.assert_array_equal(
        tokens, [[BOS, 0, 1, 2, EOS, BOS, 3, 4], [5, 6, 7, 8, 9, 10, 11, EOS], [BOS, 12, EOS, *[PAD] * 5]]
    )
    np.testing.assert_array_equal(segments, [[1] * 5 + [2] * 3, [1] * 8, [1] * 3 + [0] * 5])
    assert totals == Totals(documents=3, tokens=19, weighted_tokens=13, text_bytes=0)
    batch = side.batch(Specials())({"tokens": tokens, "segments": segments}, np.arange(3), 0, 0)
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 0, 1, 2])
