"""Classes of texts and of words: where the label stands, what is cut, and how labels are numbered."""

import numpy as np
import pytest
from specials import BOS, EOS, PAD, Specials, made

from jaxllm.data.documents import Document
from jaxllm.data.examples import labels
from jaxllm.data.shards import Totals


def packed(objective: str, model: str, documents: list[Document], classes: tuple[str, ...], **data: object):
    side, totals = made(objective, model, **data), Totals()
    blocks = list(side.pack(documents, Specials(), classes, totals))
    rows = {name: np.concatenate([block[name] for block in blocks]).astype(np.int32) for name in side.columns(50)}
    return side.batch(Specials())(rows, np.arange(len(rows["tokens"])), 0, 0), totals


@pytest.mark.parametrize(("model", "places"), [("bert", (0, 0)), ("gpt", (3, 4)), ("llama", (3, 4))])
def test_the_label_stands_where_the_model_has_seen_the_text(model: str, places: tuple[int, int]) -> None:
    documents = [Document("ab", "", "yes"), Document("abcdef", "", "no")]
    batch, totals = packed("sequence_classification", model, documents, ("no", "yes"), row_tokens=5)
    np.testing.assert_array_equal(batch["tokens"], [[BOS, 0, 1, EOS, PAD], [BOS, 0, 1, 2, EOS]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 1, 0], [1] * 5])
    for row, (place, label) in enumerate(zip(places, (1, 0), strict=True)):
        assert np.flatnonzero(batch["weights"][row]).tolist() == [place]
        assert batch["targets"][row].tolist() == [label if index == place else 0 for index in range(5)]
    assert "token_types" not in batch
    assert totals == Totals(documents=2, tokens=9, weighted_tokens=2, cut=1, padding=1)


@pytest.mark.parametrize(
    ("texts", "first", "second"),
    [
        (("ab", "c"), "ab", "c"),
        (("abcdefgh", "ab"), "abc", "ab"),
        (("ab", "abcdefgh"), "ab", "abc"),
        (("abcdef", "ghijkl"), "abc", "gh"),
    ],
)
def test_pairs_lose_the_end_of_the_longer_text(texts: tuple[str, str], first: str, second: str) -> None:
    documents = [Document(texts[0], "", "x", texts[1])]
    batch, totals = packed("sequence_classification", "bert", documents, ("x",), row_tokens=8, pair_field="b")
    ids = [BOS, *Specials().encode(first), EOS, *Specials().encode(second), EOS]
    assert batch["tokens"][0].tolist() == ids + [PAD] * (8 - len(ids))
    assert batch["token_types"][0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (8 - len(ids))
    assert totals.cut == (len("".join(texts)) > 5)
    assert "token_types" not in packed("sequence_classification", "gpt", documents, ("x",), row_tokens=8, pair_field="b")[0]


def test_rows_too_short_for_a_text() -> None:
    with pytest.raises(ValueError, match=r"rows of 4 tokens do not hold a text to classify(.|\n)*Accepted: 5 or more"):
        made("sequence_classification", row_tokens=4)


@pytest.mark.parametrize("model", ["bert", "gpt"])
def test_each_word_has_its_label_once(model: str) -> None:
    """At its first token (an encoder; here the space before it), or its last one; two texts share a row."""
    documents = [Document("ab c def", "", ("B", "O", "I")), Document("g", "", ("I",)), Document("abc def gh", "", ("O", "I", "B"))]
    batch, totals = packed("token_classification", model, documents, ("B", "I", "O"), row_tokens=14)
    rows = [[BOS, 0, 1, 26, 2, 26, 3, 4, 5, EOS, BOS, 6, EOS, PAD], [BOS, 0, 1, 2, 26, 3, 4, 5, 26, 6, 7, EOS, PAD, PAD]]
    np.testing.assert_array_equal(batch["tokens"], rows)
    np.testing.assert_array_equal(batch["segments"], [[1] * 10 + [2] * 3 + [0], [1] * 12 + [0] * 2])
    places = {"bert": [[1, 3, 5, 11], [1, 4, 8]], "gpt": [[2, 4, 8, 11], [3, 7, 10]]}[model]
    assert [np.flatnonzero(row).tolist() for row in batch["weights"]] == places
    assert [row[place].tolist() for row, place in zip(batch["targets"], places, strict=True)] == [[0, 2, 1, 1], [2, 1, 0]]
    assert not batch["targets"][batch["weights"] == 0].any()
    assert totals == Totals(documents=3, tokens=25, weighted_tokens=7)


def test_a_long_text_is_cut_at_a_word() -> None:
    batch, totals = packed("token_classification", "gpt", [Document("ab cd ef", "", ("x", "y", "x"))], ("x", "y"), row_tokens=8)
    assert batch["tokens"].tolist() == [[BOS, 0, 1, 26, 2, 3, EOS, PAD]]
    assert (totals.cut, totals.weighted_tokens) == (1, 2)


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
    ],
)
def test_labels_are_sorted(names: list[str], ordered: tuple[str, ...]) -> None:
    assert labels.distinct(names) == ordered
    assert labels.index(ordered) == {name: place for place, name in enumerate(ordered)}


def test_unknown_labels_are_named() -> None:
    labels.check_known(["a"], ("a", "b"), "the file")
    with pytest.raises(ValueError, match=r"^the file has labels that the training data lacks: c, d\.\n  Accepted: a, b\.\n"):
        labels.check_known(["d", "a", "c"], ("a", "b"), "the file")
