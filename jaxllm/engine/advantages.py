"""How much better than expected each token of an answer was: by comparing answers (grpo), or by a value head (ppo).

Letters: R answers of a batch, N tokens of an answer, X all tokens of all answers of a block.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data import experience
from jaxllm.decode import rollouts
from jaxllm.objectives import policy_losses

COEFFICIENT = "kl_coefficient"


class Answers(NamedTuple):
    """Of one batch. layout, arrays: where they lie in rows. old_RN, reference_RN: log-probabilities by the trainer's own forward pass.

    values_RN: by its value head, 0 without one. counted_R: tokens that count in the loss.
    """

    prompts: Sequence[np.ndarray]
    drawn: rollouts.Drawn
    texts: tuple[list[str], list[str]]
    rewards_R: np.ndarray
    parts: dict[str, np.ndarray]
    layout: experience.Layout
    arrays: dict[str, np.ndarray]
    old_RN: np.ndarray
    reference_RN: np.ndarray
    values_RN: np.ndarray
    counted_R: np.ndarray


class Learnt(NamedTuple):
    """batches: of each batch of a block, name -> float64 [R, N]. row: metrics of the block."""

    batches: list[dict[str, np.ndarray]]
    row: dict[str, float]


def compare(rl: Any, block: Sequence[Answers], before: Mapping[str, float] | None) -> Learnt:
    """Advantages over the other answers to a prompt, each token's that of its answer (grpo)."""
    del before

    def one(answers: Answers) -> dict[str, np.ndarray]:
        advantages_R = policy_losses.group_advantages(answers.rewards_R.reshape(-1, rl.answers), rl.scale_rewards).reshape(-1)
        return {"reference": answers.reference_RN, "advantages": advantages_R[:, None] * np.ones_like(answers.old_RN)}

    return Learnt([one(answers) for answers in block], {})


def estimate(rl: Any, block: Sequence[Answers], before: Mapping[str, float] | None) -> Learnt:
    """Generalized advantages by the values, and the returns that values are to learn (ppo).

    The advantages have mean 0 and variance 1 over all tokens of the block that count, those of the returns are as they are. before: `row`
    of the block before this one, from whose divergence the KL coefficient follows.
    """
    old_RN, reference_RN, values_RN, rewards_R, counted_R, lengths_R = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (each.old_RN, each.reference_RN, each.values_RN, each.rewards_R, each.counted_R, each.drawn.lengths_R)
                for each in block
            ),
            strict=True,
        )
    )
    coefficient = next_coefficient(rl, len(rewards_R), before)
    rewards_RN = policy_losses.token_rewards(rewards_R, old_RN - reference_RN, lengths_R, coefficient)
    advantages_RN = policy_losses.generalized_advantages(rewards_RN, values_RN, lengths_R, rl.gamma, rl.gae_lambda)
    found = {
        "advantages": policy_losses.whitened(advantages_RN, counted_R),
        "old_values": values_RN,
        "returns": advantages_RN + values_RN,
    }
    split = {name: np.split(values, len(block)) for name, values in found.items()}
    batches = [{name: values[number] for name, values in split.items()} for number in range(len(block))]
    inside_RN = np.arange(old_RN.shape[1]) < lengths_R[:, None]
    return Learnt(batches, {COEFFICIENT: coefficient, "explained": explained(found["returns"][inside_RN], values_RN[inside_RN])})


def next_coefficient(rl: Any, answers: int, before: Mapping[str, float] | None) -> float:
    """The KL coefficient of a block of so many answers: rl.kl, or where there is a target, what follows from the block before it.

    Its gain is that of the code of Ziegler et al. 2019 (lm-human-preferences): answers / rl.kl_horizon, where the paper has 0.1.
    """
    if not rl.kl_target or before is None:
        return float(rl.kl)
    return policy_losses.adapted_coefficient(before[COEFFICIENT], before["kl"], rl.kl_target, min(1.0, answers / rl.kl_horizon))


def explained(returns_X: np.ndarray, values_X: np.ndarray) -> float:
    """Share of the variance of returns that the values know of: 1 at best, 0 as good as one number, below 0 worse."""
    return float(1 - (returns_X - values_X).var() / returns_X.var()) if returns_X.var() else 0.0


# By the objective.
FORMS: dict[str, Callable[[Any, Sequence[Answers], Mapping[str, float] | None], Learnt]] = {"grpo": compare, "ppo": estimate}
