"""Rewards of one's own, as a user writes them."""

from collections.abc import Mapping, Sequence
from typing import Any


def sevens(prompts: Sequence[str], answers: Sequence[str], fields: Mapping[str, Sequence[Any]]) -> list[float]:
    """Share of the answer that is the digit 7; an answer that is empty is worth nothing."""
    del prompts, fields
    return [answer.count("7") / max(len(answer), 1) for answer in answers]


class Failure(Exception):
    """What ends a run."""


calls = {"left": -1}


def failing(prompts: Sequence[str], answers: Sequence[str], fields: Mapping[str, Sequence[Any]]) -> list[float]:
    """The same; it fails once, after so many calls as calls["left"] says (below 0: never)."""
    calls["left"] -= 1
    if calls["left"] == -1:
        raise Failure
    return sevens(prompts, answers, fields)
