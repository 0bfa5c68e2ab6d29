"""Prompts and answers in packed rows: nothing is lost or mixed, and numbers a token find their way in and out."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data import experience

MOST, PAD = 6, 99


def drawn(sizes: list[tuple[int, int]]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Prompts, answers and their lengths, no token twice."""
    ids, prompts = iter(range(100, 100_000)), []
    tokens_RN = np.zeros((len(sizes), MOST), np.int32)
    for row, (prompt, answer) in enumerate(sizes):
        prompts.append(np.array([next(ids) for _ in range(prompt)]))
        tokens_RN[row, :answer] = [next(ids) for _ in range(answer)]
    return prompts, tokens_RN, np.array([answer for _, answer in sizes])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, MOST)), min_size=1, max_size=24), st.integers(10, 23))
def test_answers_come_back(sizes: list[tuple[int, int]], width: int) -> None:
    """As many rows as `least_answers` asks for hold them, however long they are."""
    prompts, tokens_RN, lengths_R = drawn(sizes)
    rows = next(n for n in range(1, 99) if experience.least_answers(5, MOST, n, width) >= len(sizes))
    layout, arrays = experience.lay(prompts, tokens_RN, lengths_R, (rows, width), PAD)
    found = {}
    for row in range(rows):
        for segment in range(1, arrays["segments"][row].max() + 1):
            inside = arrays["segments"][row] == segment
            np.testing.assert_array_equal(arrays["positions"][row][inside], np.arange(inside.sum()))
            ids = arrays["tokens"][row][inside].tolist()
            targets = arrays["targets"][row][inside].tolist()
            assert ids[1:] == targets[:-1]
            found[ids[0]] = [*ids, targets[-1]]
    expected = {prompt[0]: [*prompt, *ids[:n]] for prompt, ids, n in zip(prompts, tokens_RN, lengths_R, strict=True)}
    assert found == expected
    assert (arrays["tokens"][arrays["segments"] == 0] == PAD).all() and (arrays["targets"][arrays["segments"] == 0] == PAD).all()
    # A number a token lies where the token is the target, and comes back from there.
    np.testing.assert_array_equal(layout.gather(arrays["targets"], tokens_RN), tokens_RN)
    spread = layout.spread(tokens_RN)
    np.testing.assert_array_equal(spread[spread > 0], arrays["targets"][spread > 0])
    assert (spread > 0).sum() == lengths_R.sum()
    np.testing.assert_array_equal(layout.gather(spread, tokens_RN), tokens_RN)


def test_a_row_by_eye() -> None:
    prompts, tokens_RN, lengths_R = [np.array([1, 2]), np.array([3])], np.array([[4, 5], [6, 0]]), np.array([2, 1])
    layout, arrays = experience.lay(prompts, tokens_RN, lengths_R, (2, 5), 0)
    expected = {
        "tokens": [[1, 2, 4, 3, 0], [0] * 5],
        "targets": [[2, 4, 5, 6, 0], [0] * 5],
        "segments": [[1, 1, 1, 2, 0], [0] * 5],
        "positions": [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]],
    }
    for name, rows in expected.items():
        np.testing.assert_array_equal(arrays[name], rows, err_msg=name)
    np.testing.assert_array_equal(layout.spread(np.array([[0.5, 1.5], [2.5, 9]])), [[0, 0.5, 1.5, 2.5, 0], [0] * 5])
