"""From logits to the next token: the filters of `generate` and the draw itself.

The filters and their order (repetition penalty, temperature, top-k, top-p, min-p) are those of Hugging Face transformers'
logits processors. Letters: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Settings:
    """How to draw a token. The defaults draw from the model's own distribution; hashable, so static under jit."""

    temperature: float = 1.0  # logits are divided by it; 0 is greedy
    top_k: int = 0  # only the k likeliest tokens; 0 means all
    top_p: float = 1.0  # only the likeliest tokens that hold this mass (Holtzman et al. 2019, arXiv:1904.09751); 1 means all
    min_p: float = 0.0  # only tokens at least this likely, as a share of the likeliest (Nguyen et al. 2024, arXiv:2407.01082)
    repetition_penalty: float = 1.0  # above 1 makes tokens seen before less likely (Keskar et al. 2019, arXiv:1909.05858); 1 is off

    def __post_init__(self) -> None:
        for name, good, accepted in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, 0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, up to 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0; 1 is off, about 1.1 to 1.3 discourages repeats"),
        ):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)}.\n  Accepted: {accepted}.\n  Change {name}.")


def sample(rng: jax.Array, logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array | None = None) -> jax.Array:
    """One token id a row, int32 [B]. `seen_BV` marks the tokens of the row so far; only a repetition penalty needs it."""
    if settings.temperature == 0:
        return jnp.argmax(_penalized(logits_BV, settings, seen_BV), axis=-1).astype(jnp.int32)
    return jax.random.categorical(rng, filtered(logits_BV, settings, seen_BV), axis=-1).astype(jnp.int32)


def filtered(logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array | None = None) -> jax.Array:
    """The logits that `sample` draws from, float32 [B, V]: every filter in order, -inf for tokens that are out."""
    logits_BV = _penalized(logits_BV, settings, seen_BV) / settings.temperature
    if 0 < settings.top_k < logits_BV.shape[-1]:
        logits_BV = keep_top_k(logits_BV, settings.top_k)
    if settings.top_p < 1:
        logits_BV = keep_top_p(logits_BV, settings.top_p)
    if settings.min_p > 0:
        logits_BV = keep_min_p(logits_BV, settings.min_p)
    return logits_BV


def _penalized(logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array | None) -> jax.Array:
    logits_BV = logits_BV.astype(jnp.float32)
    if settings.repetition_penalty == 1:
        return logits_BV
    if seen_BV is None:
        raise ValueError(
            f"repetition_penalty = {settings.repetition_penalty} without seen_BV.\n  Accepted: a bool array [B, V] of the tokens"
            " so far.\n  Pass seen_BV, or set repetition_penalty to 1."
        )
    return penalize_seen(logits_BV, seen_BV, settings.repetition_penalty)


def penalize_seen(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits of seen tokens moved down for penalty > 1: divided by it where positive, multiplied by it where negative."""
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """-inf for all but the k largest; whatever equals the k-th stays too."""
    return _keep_likeliest(logits_BV, jnp.ones(logits_BV.shape, jnp.float32), k)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """-inf for all but the smallest set of likeliest tokens that holds a mass of at least p; whatever equals the last stays too."""
    return _keep_likeliest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def _keep_likeliest(logits_BV: jax.Array, amounts_BV: jax.Array, enough: float) -> jax.Array:
    """-inf for all but the largest logits, as few as have `enough` of the amounts together.

    Finds the smallest logit that stays by bisection over the 32 bits of a float: 32 sums over V, where a sort of 50,000
    logits on a CPU takes as long as the forward pass of a small model.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV.astype(jnp.float32), jnp.uint32)
    # Unsigned numbers in the order of the floats: negative ones have all bits turned, the others the sign bit.
    ranks_BV = jnp.where(bits_BV >> 31, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def set_bit(step: jax.Array, cut_B1: jax.Array) -> jax.Array:
        higher_B1 = cut_B1 | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        found_B1 = jnp.sum(jnp.where(ranks_BV >= higher_B1, amounts_BV, 0), axis=-1, keepdims=True)
        return jnp.where(found_B1 >= enough, higher_B1, cut_B1)

    cut_B1 = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(ranks_BV[:, :1]))
    return jnp.where(ranks_BV >= cut_B1, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """-inf for tokens less likely than p times the likeliest."""
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    return jnp.where(probabilities_BV < p * probabilities_BV.max(-1, keepdims=True), -jnp.inf, logits_BV)
