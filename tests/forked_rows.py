"""Rows of prompts with several answers each, packed by hand as a batch has them: what the data side makes, without a tokenizer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Forked(NamedTuple):
    """A prompt and its answers, branch 1, 2, ... in order."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]


def pack(rows: Sequence[Sequence[Forked]], width: int) -> dict[str, np.ndarray]:
    """The arrays [B, T] of a batch: of each prompt all but its last token, then that and each answer but its end."""
    names = ("tokens", "targets", "segments", "positions", "weights", "branches")
    batch = {name: np.zeros((len(rows), width), np.float32 if name == "weights" else np.int32) for name in names}
    for row, forked_rows in enumerate(rows):
        start = 0
        for segment, forked in enumerate(forked_rows, 1):
            trunk = list(forked.prompt[:-1])
            parts = [(trunk, list(forked.prompt[1:]), 0.0, 0, 0)]
            for branch, answer in enumerate(forked.answers, 1):
                parts.append(([forked.prompt[-1], *answer[:-1]], list(answer), 1.0, branch, len(trunk)))
            for tokens, targets, weight, branch, position in parts:
                place = slice(start, start + len(tokens))
                assert place.stop <= width, "the row is too short"
                given = (tokens, targets, segment, position + np.arange(len(tokens)), weight, branch)
                for name, value in zip(names, given, strict=True):
                    batch[name][row, place] = value
                start = place.stop
    return batch


def alone(forked: Forked, branch: int) -> np.ndarray:
    """int32 [1, T]: the ids of a prompt and one answer in a row of their own, all but the last one."""
    return np.array([[*forked.prompt, *forked.answers[branch - 1][:-1]]], np.int32)


def draw(rng: np.random.Generator, vocab: int, prompt: int, *answers: int) -> Forked:
    """Random ids of these lengths."""
    return Forked(rng.integers(0, vocab, prompt).tolist(), [rng.integers(0, vocab, size).tolist() for size in answers])
