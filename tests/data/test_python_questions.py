"""Questions and answers against what Python itself says of the objects, and against a small library whose answers are written by hand."""

import importlib
import inspect
import re
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import pytest

from jaxllm import config as schema
from jaxllm.data import documents
from jaxllm.data.documents import Document

# Each is imported without a display or another system.
IMPORTED = ("bisect", "configparser", "fractions", "json", "mailbox", "shutil", "statistics", "tarfile", "textwrap", "zipfile")
SHOP = '''"""What a shop sells.

More of it."""

class Basket:
    """Holds what was taken
    from the shelves.  It has no bottom."""
    def put(self, item, /, count=1, *, fresh: bool=False):
        """Puts an item into it."""
    @property
    def weight(self):
        """Weight in kilograms"""
    @weight.setter
    def weight(self, value):
        """Never asked about."""
    @property
    def price(self):
        return 0
    @price.setter
    def price(self, value):
        """Price in euros."""
    @staticmethod
    def empty(size):
        """Gives a basket with nothing inside."""
    def shake(self, /):
        """Puts an item into it."""
    def _hidden(self):
        """Nobody asks about this."""

if True:
    def pay(amount, *coins):
        """Pays an amount in coins."""
def owe(amount):
    """Deprecated since 3.2: use pay."""
def lend():
    """Lends."""
def call():
    """call(number) -> answer of the clerk"""
def form(self, parameters):
    """Something that a decorator makes."""
def silent():
    pass
'''
# By the number that is drawn for every object: 0 asks where it is, 1 how it is called, 2 what it is for, as 0 and 1 do where they cannot.
ASKED = {
    0: [
        ("What is the module shop for?", "What a shop sells."),
        ("Which module has the class Basket?", "It is in the module shop."),
        ("What does shop.Basket.put do?", "Puts an item into it."),
        ("What is shop.Basket.weight?", "Weight in kilograms."),
        ("What is shop.Basket.price?", "Price in euros."),
        ("What does shop.Basket.empty do?", "Gives a basket with nothing inside."),
        ("Which module has the function pay?", "It is in the module shop."),
        ("Which module has the function lend?", "It is in the module shop."),
        ("Which module has the function call?", "It is in the module shop."),
        ("Which module has the function form?", "It is in the module shop."),
    ],
    1: [
        ("What is the module shop for?", "What a shop sells."),
        ("What is shop.Basket?", "Holds what was taken from the shelves."),
        ("Which arguments does shop.Basket.put take?", "It takes (item, /, count=1, *, fresh: bool=False)."),
        ("What is shop.Basket.weight?", "Weight in kilograms."),
        ("What is shop.Basket.price?", "Price in euros."),
        ("Which arguments does shop.Basket.empty take?", "It takes (size)."),
        ("Which arguments does shop.Basket.shake take?", "It takes no arguments."),
        ("Which arguments does shop.pay take?", "It takes (amount, *coins)."),
        ("Which arguments does shop.lend take?", "It takes no arguments."),
        ("Which arguments does shop.call take?", "It takes no arguments."),
        ("What does shop.form do?", "Something that a decorator makes."),
    ],
    2: [
        ("What is the module shop for?", "What a shop sells."),
        ("What is shop.Basket?", "Holds what was taken from the shelves."),
        ("What does shop.Basket.put do?", "Puts an item into it."),
        ("What is shop.Basket.weight?", "Weight in kilograms."),
        ("What is shop.Basket.price?", "Price in euros."),
        ("What does shop.Basket.empty do?", "Gives a basket with nothing inside."),
        ("What does shop.pay do?", "Pays an amount in coins."),
        ("What does shop.form do?", "Something that a decorator makes."),
    ],
}


def read(objective: str = "sft") -> list[Document]:
    config = schema.base()
    config.train.objective = objective
    return list(documents.open("python_questions", config))


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return read()


def found(library: list[Document], pattern: str) -> dict[str, tuple[Any, re.Match[str]]]:
    """By name: the object of each module of IMPORTED whose answer matches, and the match."""
    matches = {}
    for document in library:
        _, _, name = document.origin.partition(":")
        match = re.fullmatch(pattern, document.messages[1]["content"])
        if match and name.partition(".")[0] in IMPORTED:
            thing = importlib.import_module(name.partition(".")[0])
            for part in name.split(".")[1:]:
                thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(f"{thing.__name__}.{part}")
            matches[name] = (thing, match)
    return matches


def test_a_few_thousand_different_ones(library: list[Document]) -> None:
    assert 3000 < len(library) < 6000
    questions, answers = zip(*(map(str, (d.messages[0]["content"], d.messages[1]["content"])) for d in library), strict=True)
    assert [[message["role"] for message in document.messages] for document in library] == [["user", "assistant"]] * len(library)
    # No object is asked about twice, so that none can be on both sides of the split, and no sentence is said of two.
    assert len({document.origin for document in library}) == len(set(questions)) == len(library)
    sentences = [answer for answer in answers if not answer.startswith(("It takes ", "It is in the module "))]
    assert len(set(sentences)) == len(sentences) > len(library) / 2
    assert max(map(len, answers)) <= 200 and min(map(len, answers)) > 8
    assert not any("deprecated" in answer.lower() or "\n" in answer for answer in answers)
    assert len({question.split()[0] for question in questions}) >= 6


def test_first_sentences_are_those_of_the_docstrings(library: list[Document]) -> None:
    said = found(library, r"(?!It takes |It is in the module )(?P<text>.*?)\.?")
    assert len(said) > 150
    for name, (thing, match) in said.items():
        assert " ".join((inspect.getdoc(thing) or "").split()).startswith(match["text"]), name


def test_modules_have_what_is_said_to_be_in_them(library: list[Document]) -> None:
    said = found(library, r"It is in the module (?P<module>[\w.]+)\.")
    assert len(said) > 10
    for name, (thing, match) in said.items():
        assert f"{thing.__module__}.{thing.__qualname__}" == name and thing.__module__ == match["module"]


def test_arguments_are_those_of_the_signature(library: list[Document]) -> None:
    said = found(library, r"It takes (?:no arguments|\((?P<arguments>.+)\))\.")
    assert len(said) > 50
    for name, (thing, match) in said.items():
        given = inspect.signature(eval(f"lambda {match['arguments'] or ''}: 0", vars(importlib.import_module(thing.__module__))))
        expected = [(each.name, each.kind) for each in inspect.signature(thing).parameters.values()]
        # A function in a class has the object itself as its first argument, unless it was bound to the class.
        bound = not inspect.isfunction(thing) or "." not in thing.__qualname__ or len(expected) == len(given.parameters)
        assert [(each.name, each.kind) for each in given.parameters.values()] == expected[not bound :], name


@pytest.mark.parametrize("drawn", ASKED)
def test_a_small_library(drawn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "_shop.py").write_text('"""Behind the shop."""')
    (tmp_path / "idlelib").mkdir()
    (tmp_path / "idlelib" / "__init__.py").write_text('"""A program, and no library."""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(zlib, "crc32", lambda name: drawn)
    assert [(document.messages[0]["content"], document.messages[1]["content"]) for document in read()] == ASKED[drawn]


@pytest.mark.parametrize("objective", ["causal_lm", "masked_lm", "seq2seq"])
def test_other_objectives_are_pointed_to_the_text(objective: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)'python_questions' holds conversations, .*'{objective}'.*Accepted.*'sft'; python_docs"
    ):
        read(objective)
