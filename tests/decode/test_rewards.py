"""Rewards by name, of one's own, and their sum."""

import sys
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.config import base
from jaxllm.decode import rewards


def made(*parts, **fields):
    config = base()
    config.rl.update({"rewards": parts, "max_new_tokens": 10, **fields})
    return rewards.make(config)


def values(name: str, answers, wanted=None, tokens=None, **fields) -> list[float]:
    beside = {"answer": wanted or [""] * len(answers), "tokens": tokens or [1] * len(answers)}
    return made((name, 1.0), **fields)(["?"] * len(answers), answers, beside)[0].tolist()


def test_exact_match():
    assert values("exact_match", ["19", " 19\n", "190", "", "x19"], ["19"] * 5) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7, that is #### 7", "7"),
        ("#### 12 ... no, #### 1,234", "1234"),
        ("It costs $1,234.50.", "1234.50"),
        ("-5", "-5"),
        ("the change is -$5.00", "-5"),
        ("8-3", "3"),
        ("x = -.5", "-0.5"),
        ("+17 degrees", "17"),
        ("7 apples and 2 pears", "2"),
        ("none", None),
        ("3 #### none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert rewards.last_number(text) == (None if number is None else Decimal(number))


def test_number():
    wanted = ["48 / 2 = 24. 48 + 24 = 72\n#### 72"] * 5
    assert values("number", ["72", "72.0", "I think 72 of them", "73", "many"], wanted) == [1, 1, 1, 0, 0]
    assert values("number", ["no number"], ["none either"]) == [0]


def test_format_wants_all_of_the_answer():
    pattern = r"<think>.*</think>\s*\d+"
    assert values("format", ["<think>a\nb</think> 3", "<think></think>3 or so", "3"], format=pattern) == [1, 0, 0]


def test_length_falls_linearly():
    """Yu et al. 2025, eq. 13, with a longest answer of 10 tokens and 4 of them soft."""
    assert values("length", [""] * 5, tokens=[1, 6, 7, 9, 10], soft_tokens=4) == [0, 0, -0.25, -0.75, -1]


def test_the_sum_is_weighted_and_each_part_is_told(monkeypatch):
    own = SimpleNamespace(longer=lambda prompts, answers, fields: [len(a) - len(p) for p, a in zip(prompts, answers, strict=True)])
    monkeypatch.setitem(sys.modules, "my_rewards", own)
    total, parts = made(("exact_match", 2.0), ("my_rewards:longer", -0.5))(["12", "1"], ["3", "145"], {"answer": ["3", "3"]})
    np.testing.assert_array_equal(total, [2.5, -1])
    np.testing.assert_array_equal(parts["my_rewards:longer"], [-1, 2])
    np.testing.assert_array_equal(parts["exact_match"], [1, 0])


@pytest.mark.parametrize(("given", "words"), [([1.0], r"shape \(1,\), for 2"), ([1.0, np.nan], "nan for an answer")])
def test_other_numbers_are_refused(monkeypatch, given, words):
    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(some=lambda prompts, answers, fields: given))
    with pytest.raises(ValueError, match=words):
        made(("my_rewards:some", 1.0))(["a", "b"], ["a", "b"], {})


def test_what_cannot_be_imported_is_refused():
    with pytest.raises(ValueError, match=r"'no_such_module:f' cannot be imported.*\n.*exact_match.*\n.*PYTHONPATH"):
        made(("no_such_module:f", 1.0))
