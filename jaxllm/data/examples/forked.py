"""Forked rows: a prompt once, and behind it each of its answers, which do not see one another.

A segment is a trunk (branch 0) and branches 1, 2, ... A token sees those before it of its segment that are of the trunk or of its own
branch, and a branch's positions go on from the trunk's end: each answer is what it would be in a row alone behind the prompt. A prompt
of P tokens and answers of A, B, ... tokens take P - 1 + A + B + ... places of a row: the prompt's last token predicts the first one of
every answer, and stands at the beginning of every branch.
"""

from collections.abc import Sequence

import numpy as np


def predicted(ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], prompt_tokens: int) -> dict[str, np.ndarray]:
    """One segment in which the answers are predicted: tokens, targets, weights and branches, int32 [length].

    ids: of the prompt with each answer; the first `prompt_tokens` (1 or more) are the same. trained: bool, which are to be predicted.
    Branch b has the tokens [p-1:-1] and the targets [p:] of the b-th one.
    """
    last = prompt_tokens - 1
    tokens = [ids[0][:last], *(each[last:-1] for each in ids)]
    targets = [ids[0][1:prompt_tokens], *(each[prompt_tokens:] for each in ids)]
    weights = [np.zeros(last, bool), *(each[prompt_tokens:] for each in trained)]
    return _side(tokens, targets, weights)


def read(ids: Sequence[np.ndarray], prompt_tokens: int) -> dict[str, np.ndarray]:
    """One segment of which the last token of each branch counts, where a head reads a score: the trunk has the whole prompt, a branch the
    whole answer, and nothing is predicted (targets are 0)."""
    tokens = [ids[0][:prompt_tokens], *(each[prompt_tokens:] for each in ids)]
    ends = [np.arange(len(each)) == len(each) - 1 for each in tokens[1:]]
    return _side(tokens, [np.zeros_like(each) for each in tokens], [np.zeros(prompt_tokens, bool), *ends])


def apart(ids: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """One segment without a trunk, of which the first token of each branch counts: the prompt stands in each branch again."""
    return _side(ids, [np.zeros_like(each) for each in ids], [np.arange(len(each)) == 0 for each in ids], first_branch=1)


def _side(
    tokens: Sequence[np.ndarray], targets: Sequence[np.ndarray], weights: Sequence[np.ndarray], first_branch: int = 0
) -> dict[str, np.ndarray]:
    arrays = {"tokens": tokens, "targets": targets, "weights": weights}
    side = {name: np.concatenate(parts).astype(np.int32) for name, parts in arrays.items()}
    branches = np.arange(first_branch, first_branch + len(tokens), dtype=np.int32)
    return side | {"branches": np.repeat(branches, [len(part) for part in tokens])}


def positions(segments_BT: np.ndarray, branches_BT: np.ndarray) -> np.ndarray:
    """int32 [B, T]: how many tokens stand before each one of what it sees: in its trunk, and in its branch."""
    place_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    new_segment = np.diff(segments_BT, axis=1, prepend=-1) != 0
    new_branch = new_segment | (np.diff(branches_BT, axis=1, prepend=-1) != 0)

    def latest(here: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate(np.where(here, place_T, 0), axis=1)

    start, fork = latest(new_segment), latest(new_branch & (branches_BT == 1))
    return np.where(branches_BT > 0, place_T - latest(new_branch) + fork - start, place_T - start).astype(np.int32)
