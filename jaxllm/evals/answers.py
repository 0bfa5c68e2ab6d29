"""What a model's likeliest answers to held-out prompts are worth."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.data.chat import encoding
from jaxllm.decode import generate, text
from jaxllm.decode.rewards import Rewards, join
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer


def measure(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    beside: Sequence[dict[str, Any]],
    rewards: Rewards,
    most_tokens: int,
) -> dict[str, Any]:
    """{"reward", "reward_NAME" of each that it sums up, "answer_tokens"} of greedy answers, means over the prompts, and "answers".

    beside: what the data knows of the prompts. An answer counts as ended if it is shorter than most_tokens.
    """
    ids = [prompt.tolist() for prompt in prompts]
    written = generate.generate(
        model,
        params,
        ids,
        sampling.Settings(temperature=0),
        max_new_tokens=most_tokens,
        stop_ids=encoding.answer_stop_ids(tokenizer),
        vocab_size=tokenizer.vocab_size,
        seed=0,
    )
    lengths = np.array([len(answer) for answer in written])
    fields = join(beside, {"tokens": lengths.tolist(), "ended": (lengths < most_tokens).tolist()})
    total, parts = rewards(*spell(tokenizer, ids, written), fields)
    means = {"reward": total} | named(parts) | {"answer_tokens": lengths}
    return {name: float(np.mean(values)) for name, values in means.items()} | {"answers": len(written)}


def spell(tokenizer: Tokenizer, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[list[str], list[str]]:
    """(texts of the prompts, texts of the answers) for rewards."""
    said = [text.Detokenizer(tokenizer, ids).text(new) for ids, new in zip(prompts, answers, strict=True)]
    return [tokenizer.decode(ids) for ids in prompts], said


def named(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The single rewards under the names that they have in a row of metrics."""
    return {f"reward_{name}": values for name, values in parts.items()}
