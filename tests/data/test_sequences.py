"""The toy pairs: the target is what the name says, no string comes twice, and what cannot be is named."""

import pytest

from jaxllm import config as schema
from jaxllm.data import documents


def read(source: str) -> list[documents.Document]:
    config = schema.base()
    config.train.objective = "seq2seq"
    return list(documents.open(source, config))


@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_pairs(task: str) -> None:
    found = read(f"sequences:{task}?count=3000&symbols=5&min=3&max=9")
    assert found == read(f"sequences:{task}?count=3000&symbols=5&min=3&max=9")
    texts = [document.text for document in found]
    assert len(set(texts)) == len(texts) == 3000
    assert all(document.target == (document.text if task == "copy" else document.text[::-1]) for document in found)
    assert set("".join(texts)) == set("abcde")
    lengths = [len(text) for text in texts]
    assert {min(lengths), max(lengths)} == {3, 9}
    assert found[17].origin == f"sequences:{task}[17]"
    longer = read(f"sequences:{task}?count=3001&symbols=5&min=3&max=9")
    assert longer[:3000] == found, "more of them leave the first ones as they are"


def test_lengths_and_symbols_are_uniform() -> None:
    """With the defaults 20,000 strings: 13 lengths with 1,538 each, 20 symbols with a twentieth each; bounds of 5 deviations."""
    texts = [document.text for document in read("sequences:copy")]
    assert len(texts) == 20_000
    for size in range(4, 17):
        assert abs(sum(len(text) == size for text in texts) - 20_000 / 13) < 5 * 39
    letters = "".join(texts)
    for symbol in "abcdefghijklmnopqrst":
        assert abs(letters.count(symbol) - len(letters) / 20) < 5 * (len(letters) / 20) ** 0.5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sequences:copi", "unknown task 'copi'"),
        ("sequences:", "unknown task ''"),
        ("sequences:copy?size=3", "unknown option 'size'"),
        ("sequences:copy?count=x", "count = 'x' is no whole number"),
        ("sequences:copy?min=0", "min = '0' is no whole number above 0"),
        ("sequences:copy?symbols=100", "symbols = 100 is more than the 62"),
        ("sequences:copy?min=5&max=4", "min = 5 is more than max = 4"),
        ("sequences:copy?symbols=2&min=1&max=3&count=8", "count = 8 is more than half of the 14 strings"),
    ],
)
def test_what_cannot_be(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(source)
    assert "\n  Accepted: sequences:copy or sequences:reverse" in str(caught.value)
