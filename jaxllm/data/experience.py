"""Prompts with answers as packed rows, and numbers a token of the answers in and out of such rows.

A segment is a prompt and its answer; the slot of the prompt's last token predicts the answer's first one. Letters: R answers, N tokens of
an answer, B rows, T row length, X all tokens of all answers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.data import fill
from jaxllm.data.examples.contract import count_positions


class Layout(NamedTuple):
    """Where answers lie in rows [B, T]. Token number places_X of answer number answers_X is the target of slot (rows_X, columns_X)."""

    shape: tuple[int, int]
    answers_X: np.ndarray
    places_X: np.ndarray
    rows_X: np.ndarray
    columns_X: np.ndarray

    def spread(self, values_RN: np.ndarray) -> np.ndarray:
        """float32 [B, T]: a number a token, at the slot that predicts it; 0 elsewhere."""
        out_BT = np.zeros(self.shape, np.float32)
        out_BT[self.rows_X, self.columns_X] = values_RN[self.answers_X, self.places_X]
        return out_BT

    def gather(self, values_BT: np.ndarray, like_RN: np.ndarray) -> np.ndarray:
        """float64, of the shape of `like_RN`: the numbers at the answers' slots; 0 behind an answer."""
        out_RN = np.zeros(like_RN.shape)
        out_RN[self.answers_X, self.places_X] = values_BT[self.rows_X, self.columns_X]
        return out_RN


def least_answers(longest_prompt: int, most_tokens: int, rows: int, width: int) -> int:
    """How many answers find a place in so many rows, however long they turn out."""
    return rows * (width // (longest_prompt + most_tokens - 1))


def lay(
    prompts: Sequence[np.ndarray], tokens_RN: np.ndarray, lengths_R: np.ndarray, shape: tuple[int, int], padding: int
) -> tuple[Layout, dict[str, np.ndarray]]:
    """(layout, {tokens, targets, segments, positions}, int32 [B, T]) of answers, each behind its own prompt, by best fit (data/fill.py).

    Rows that are left over are padding. The answers must fit: see `least_answers`.
    """
    sizes_R = np.array([len(prompt) for prompt in prompts]) + lengths_R - 1
    arrays = {name: np.full(shape, padding, np.int32) for name in ("tokens", "targets")} | {"segments": np.zeros(shape, np.int32)}
    rows_R, columns_R = np.zeros(len(prompts), int), np.zeros(len(prompts), int)
    for row, chosen in enumerate(fill.best_fit(sizes_R[:, None], (shape[1],))):
        start = 0
        for segment, number in enumerate(chosen, start=1):
            ids = np.concatenate([prompts[number], tokens_RN[number, : lengths_R[number]]])
            stop = start + sizes_R[number]
            arrays["tokens"][row, start:stop], arrays["targets"][row, start:stop] = ids[:-1], ids[1:]
            arrays["segments"][row, start:stop] = segment
            rows_R[number], columns_R[number] = row, start + len(prompts[number]) - 1
            start = stop
    answers_X = np.repeat(np.arange(len(prompts)), lengths_R)
    places_X = np.arange(lengths_R.sum()) - np.repeat(np.cumsum(lengths_R) - lengths_R, lengths_R)
    layout = Layout(shape, answers_X, places_X, rows_R[answers_X], columns_R[answers_X] + places_X)
    return layout, arrays | {"positions": count_positions(arrays["segments"])}
