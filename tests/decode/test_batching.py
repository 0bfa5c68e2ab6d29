"""Few shapes, and random streams that name a prompt and not its place."""

import numpy as np

from jaxllm.decode import batching


def test_buckets_are_few_and_never_above_the_context() -> None:
    sizes = {size: batching.bucket(size, 32, 200) for size in range(1, 201)}
    assert all(size <= bucket for size, bucket in sizes.items())
    assert set(sizes.values()) == {32, 64, 128, 200}


def test_padded_batch() -> None:
    prompts = [[5, 6, 7], [8], [9, 9]]
    batch = batching.pad(prompts, batching.streams(prompts), [61, 62, 62], context_tokens=64)
    assert batch.tokens_BT.shape == (4, 32)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(batch.tokens_BT[row], prompt + [0] * (32 - len(prompt)))
    np.testing.assert_array_equal(batch.lengths_B, [3, 1, 2, 1])
    np.testing.assert_array_equal(batch.limits_B, [61, 62, 62, 0])


def test_groups_hold_every_prompt_once_beside_others_of_its_length() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 100, 3 * batching.MOST_SEQS + 5)]
    groups = batching.group(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert [len(group) for group in groups] == [batching.MOST_SEQS] * 3 + [5]
    longest = [max(lengths[index] for index in group) for group in groups]
    shortest = [min(lengths[index] for index in group) for group in groups]
    assert all(long <= short for long, short in zip(longest, shortest[1:], strict=False))


def test_streams_name_the_prompt_and_its_copy() -> None:
    one = batching.streams([[1, 2], [3], [1, 2]])
    other = batching.streams([[9], [1, 2], [1, 2], [3]])
    assert {tuple(row) for row in one} <= {tuple(row) for row in other}
    assert len({tuple(row) for row in other}) == 4
    assert tuple(one[0]) != tuple(one[2])
