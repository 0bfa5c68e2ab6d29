"""The losses of policy gradients, as pure functions: GRPO with its later forms, and PPO.

GRPO  Shao et al. 2024, arXiv:2402.03300: the clipped ratio (eq. 3), the KL divergence to a reference (eq. 4), advantages in a group.
      Forms of its mean: `grpo` (eq. 3), `bnpo`, `dr_grpo` (Liu et al. 2025, arXiv:2503.20783), `dapo` (Yu et al. 2025, arXiv:2503.14476).
PPO   Schulman et al. 2017, arXiv:1707.06347: the same clipped ratio (eq. 7); advantages of Schulman et al. 2015, arXiv:1506.02438.
      Its penalty for leaving the reference: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

What depends on the parameters is JAX and of any shape [...], a number a token; what is known when the answers are there is NumPy in
float64. Letters: N answers, G answers a prompt, T tokens of an answer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Added to a standard deviation, as TRL 1.16 has it.
STD_EPS = 1e-4
# Of the adaptive KL coefficient: the most that an error counts (Ziegler et al. 2019, section 2.2).
MOST_ERROR = 0.2


class Clipped(NamedTuple):
    """loss: to be minimized. low, high: 1 where the ratio is clipped at that end, so that the token has no gradient; else 0."""

    loss: jax.Array
    low: jax.Array
    high: jax.Array


def clipped(log_p: jax.Array, old: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float) -> Clipped:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = p / p_old (Schulman et al. 2017, eq. 7; Shao et al. 2024, eq. 3).

    With two bounds it is DAPO's (Yu et al. 2025, eq. 8).
    """
    ratio = jnp.exp(log_p - old)
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return Clipped(loss, low.astype(loss.dtype), high.astype(loss.dtype))


def kl(log_p: jax.Array, reference: jax.Array) -> jax.Array:
    """p_ref / p - log(p_ref / p) - 1: of tokens drawn from p an unbiased estimate of KL(p | p_ref), never below 0 (Shao et al., eq. 4)."""
    difference = reference - log_p
    return jnp.exp(difference) - difference - 1


def value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float) -> tuple[jax.Array, jax.Array]:
    """(half the squared error, 1 where it is clipped): the larger of that of the value and of the value clipped to old +- clip.

    As OpenAI's code for PPO and for Ziegler et al. 2019 has it, not in the papers' equations.
    """
    near = jnp.clip(values, old_values - clip, old_values + clip)
    squared, squared_near = jnp.square(values - returns), jnp.square(near - returns)
    return jnp.maximum(squared, squared_near) / 2, (squared_near > squared).astype(squared.dtype)


def group_advantages(rewards_NG: np.ndarray, scale: str) -> np.ndarray:
    """float64 [N, G]: (reward - mean of the group) / (standard deviation + 1e-4) (Shao et al. 2024, section 4.1.2).

    The deviation is that of a sample (G - 1 in the denominator), as in TRL. scale: of the "group" or of the whole "batch"; "none" does
    not divide (Liu et al. 2025, section 3.1).
    """
    rewards_NG = rewards_NG.astype(np.float64)
    centered_NG = rewards_NG - rewards_NG.mean(1, keepdims=True)
    if scale == "none":
        return centered_NG
    deviation = rewards_NG.std(1, ddof=1, keepdims=True) if scale == "group" else rewards_NG.std(ddof=1)
    return np.asarray(centered_NG / (deviation + STD_EPS))


def token_weights(form: str, lengths_N: np.ndarray, most_tokens: int, mean_tokens: float) -> np.ndarray:
    """float64 [N]: what each token of an answer counts in the loss of its batch, which is a plain sum then.

    lengths_N: tokens that count of each answer of the batch; 0 for one that is left out, which still is one of N. most_tokens: of any
    answer. mean_tokens: that count in a batch, on average over all that were made with it.

    grpo     1 / (N length): each answer counts alike (Shao et al. 2024, eq. 3)
    bnpo     1 / tokens of the batch
    dr_grpo  1 / (N most_tokens): long answers are not favoured (Liu et al. 2025, section 3.1)
    dapo     1 / mean_tokens (Yu et al. 2025, eq. 8, which has one batch)
    """
    lengths_N = lengths_N.astype(np.float64)
    answers = len(lengths_N)
    if form == "grpo":
        return 1 / (answers * np.maximum(lengths_N, 1))
    shares = {"bnpo": max(lengths_N.sum(), 1), "dr_grpo": answers * most_tokens, "dapo": max(mean_tokens, 1)}
    return np.full(answers, 1 / shares[form])


def token_rewards(rewards_N: np.ndarray, log_ratios_NT: np.ndarray, lengths_N: np.ndarray, coefficient: float) -> np.ndarray:
    """float64 [N, T]: -coefficient log(p / p_ref) at each token of an answer, and its reward at the last one (Ziegler et al., eq. 2)."""
    place_T = np.arange(log_ratios_NT.shape[1])
    inside_NT = place_T < lengths_N[:, None]
    rewards_NT = np.where(inside_NT, -coefficient * log_ratios_NT.astype(np.float64), 0)
    rewards_NT[np.arange(len(rewards_N)), lengths_N - 1] += rewards_N
    return rewards_NT


def generalized_advantages(
    rewards_NT: np.ndarray, values_NT: np.ndarray, lengths_N: np.ndarray, gamma: float, decay: float
) -> np.ndarray:
    """float64 [N, T]: sum over l of (gamma decay)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2015, eq. 16).

    decay: their lambda. V is 0 behind an answer, where nothing comes any more. 0 outside of the answers. The returns, which values are to
    learn, are advantages + values.
    """
    inside_NT = np.arange(rewards_NT.shape[1]) < lengths_N[:, None]
    values_NT = np.where(inside_NT, values_NT.astype(np.float64), 0)
    following_NT = np.pad(values_NT[:, 1:], ((0, 0), (0, 1)))
    deltas_NT = np.where(inside_NT, rewards_NT + gamma * following_NT - values_NT, 0)
    advantages_NT, behind_N = np.zeros_like(deltas_NT), np.zeros(len(deltas_NT))
    for place in reversed(range(deltas_NT.shape[1])):
        behind_N = deltas_NT[:, place] + gamma * decay * behind_N
        advantages_NT[:, place] = behind_N
    return advantages_NT


def whitened(advantages_NT: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """float64 [N, T]: with mean 0 and variance 1 over all tokens of the answers; 0 outside of them."""
    inside_NT = np.arange(advantages_NT.shape[1]) < lengths_N[:, None]
    inside = advantages_NT[inside_NT]
    if not inside.size:  # all answers were left out
        return np.zeros_like(advantages_NT)
    return np.where(inside_NT, (advantages_NT - inside.mean()) / np.sqrt(inside.var() + 1e-8), 0)


def adapted_coefficient(coefficient: float, found: float, target: float, gain: float) -> float:
    """The next KL coefficient: times 1 + gain clip(KL / target - 1, -0.2, 0.2) (Ziegler et al. 2019, section 2.2, whose gain is 0.1)."""
    return float(coefficient * (1 + gain * np.clip(found / target - 1, -MOST_ERROR, MOST_ERROR)))
