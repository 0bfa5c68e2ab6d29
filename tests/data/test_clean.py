"""Each cleaner on its own, then what `make` adds: order, names, untouched texts."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import config as schema
from jaxllm import registry
from jaxllm.data import clean
from jaxllm.data.documents import Document


def cleaner(*names, **fields):
    config = schema.base()
    config.data.cleaners = names
    config.data.update(fields)
    return clean.make(config)


CASES = [
    ("unicode", "e\u0301\u212b", "\u00e9\u00c5"),  # composed; the Angstrom sign is canonically A with ring
    ("unicode", "\ufb01 \u00b2", "\ufb01 \u00b2"),  # compatibility forms stay: NFC, not NFKC
    ("unicode", "a\r\nb\rc\u2028d\x85e\x0cf", "a\nb\nc\nd\ne\nf"),
    ("unicode", "\ufeffzero\u200bwidth soft\u00adhyphen \ufffd", "zerowidth softhyphen "),
    (
        "unicode",
        "\u0646\u200c\u0645 \U0001f469\u200d\U0001f680",
        "\u0646\u200c\u0645 \U0001f469\u200d\U0001f680",
    ),  # joiners spell words
    ("unicode", "e\u200b\u0301", "\u00e9"),  # composed after what stood between is gone
    ("unicode", "lone \ud800 half", "lone  half"),
    ("control", "a\x00b\x1b[0m\x7f\x9f\tc\nd", "ab[0m\tc\nd"),
    ("whitespace", "\n\n    def f():  \n\t\treturn\u00a0\n\n\n\n\n\nend \n\n", "    def f():\n\t\treturn\n\n\nend"),
    ("whitespace", "a\n\n\nb", "a\n\n\nb"),
    ("whitespace", " \n\t\n", ""),
]


@pytest.mark.parametrize(("name", "before", "after"), CASES)
def test_cleaners(name, before, after):
    assert cleaner(name)(Document(before, "here")) == Document(after, "here")


@settings(deadline=None)
@given(st.text(), st.sampled_from(["unicode", "control", "whitespace"]))
def test_a_cleaned_text_is_clean(text, name):
    once = cleaner(name)(Document(text, ""))
    assert cleaner(name)(once) == once


@settings(deadline=None)
@given(st.text())
def test_all_cleaners_leave_what_they_promise(text):
    found = cleaner("unicode", "control", "whitespace", "min_chars")(Document(text, ""))
    if isinstance(found, clean.Dropped):
        return
    assert found.text.encode() and "\r" not in found.text
    assert not any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in found.text)
    assert not any(line != line.rstrip() for line in found.text.split("\n"))


def test_a_dropped_document_names_the_cleaner_and_keeps_the_original():
    short = cleaner("whitespace", "min_chars", min_chars=4)
    assert short(Document("abcd  ", "x:1")) == Document("abcd", "x:1")
    assert short(Document(" abc  \n", "x:2")) == Document(" abc", "x:2")
    assert short(Document("abc    ", "x:3")) == clean.Dropped(Document("abc    ", "x:3"), "min_chars")


def test_the_order_is_the_given_one():
    document = Document("ab    ", "")
    assert isinstance(cleaner("whitespace", "min_chars", min_chars=4)(document), clean.Dropped)
    assert cleaner("min_chars", "whitespace", min_chars=4)(document) == Document("ab", "")


def test_no_cleaners_leave_the_text_as_it_is():
    text = "\ufeff\r\n e\u0301 \x00\n\n\n\n"
    assert cleaner()(Document(text, "")).text == text


def test_long_runs_of_spaces_take_linear_time():
    """A regular expression for trailing spaces would try every start of the run: 10^10 steps, hours."""
    text = "a" + " " * 200_000 + "b"
    assert cleaner(*registry.names("cleaner"))(Document(text, "")).text == text
