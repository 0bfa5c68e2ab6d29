"""Losses of preferences, as functions of the log-probabilities of whole answers. Elementwise: a loss for each pair or answer.

With log p and log p_ref the sums over the tokens of an answer y to a prompt x, by the model and by the reference, w the chosen and l the
rejected answer, s the logistic function, and

    r = log p - log p_ref        delta = r(w) - r(l)

the losses of a pair are (b: beta, e: label_smoothing, m: margin)

    sigmoid   -log s(b delta)                                           Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (DPO)
    cdpo      -(1 - e) log s(b delta) - e log s(-b delta)               Mitchell 2023, "A note on DPO with noisy preferences"
    robust    (-(1 - e) log s(b delta) + e log s(-b delta)) / (1 - 2e)  Chowdhury et al. 2024, arXiv:2403.00409, section 3
    hinge     max(0, 1 - b delta)                                       Zhao et al. 2023, arXiv:2305.10425 (SLiC), on r as DPO has it
    ipo       (r(w) / |w| - r(l) / |l| - 1 / (2b))^2                    Azar et al. 2023, arXiv:2310.12036, eq. 17
    orpo      -log p(w) / |w| - b log s(log odds(w) / odds(l))          Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7
    simpo     -log s(b (log p(w) / |w| - log p(l) / |l|) - m)           Meng et al. 2024, arXiv:2405.14734, eq. 6

|y| is the number of tokens; odds(y) = P / (1 - P) of P = exp(log p(y) / |y|), eq. 3 and 4 of ORPO. An answer that is good or bad by
itself has the loss (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8)

    kto       u (1 - s(b (r - kl))) if it is good, v (1 - s(b (kl - r))) if it is bad

where u and v are weights, and kl >= 0 is how far the model is from the reference, without a gradient.

They are those of TRL 1.16, with these exceptions. IPO's paper has sums; the means of tokens are what its authors used and TRL does.
ORPO's likelihood term is the answer's alone, a mean over pairs, as in the paper; TRL's is that of prompt and answer, a mean over
tokens. cDPO is not among TRL's DPO losses, but its CPO has the same form.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The mean log-probability nearest to certainty that has finite odds: 1 - exp of it is the smallest step below 1 of float32.
CERTAIN = -(2.0**-24)


class Answers(NamedTuple):
    """Of each answer: log p by the model, the same by the reference (0 where a loss has none), and its tokens, 1 or more."""

    log_p: jax.Array
    reference: jax.Array
    tokens: jax.Array

    @property
    def ratio(self) -> jax.Array:
        """r: log p less that of the reference."""
        return self.log_p - self.reference

    @property
    def mean(self) -> jax.Array:
        """log p a token."""
        return self.log_p / self.tokens


class How(NamedTuple):
    """The numbers beside them: b, e and m; u and v of KTO."""

    beta: float
    label_smoothing: float = 0.0
    margin: float = 0.0
    desirable: float = 1.0
    undesirable: float = 1.0


# (chosen, rejected, how) -> a loss for each pair, in the shape of what is given.
PairLoss = Callable[[Answers, Answers, How], jax.Array]


def sigmoid(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    return -jax.nn.log_sigmoid(_scaled(chosen, rejected, how))


def cdpo(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    kept, flipped = _both(chosen, rejected, how)
    return (1 - how.label_smoothing) * kept + how.label_smoothing * flipped


def robust(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    kept, flipped = _both(chosen, rejected, how)
    return ((1 - how.label_smoothing) * kept - how.label_smoothing * flipped) / (1 - 2 * how.label_smoothing)


def hinge(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    return jax.nn.relu(1 - _scaled(chosen, rejected, how))


def ipo(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    delta = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens
    return (delta - 1 / (2 * how.beta)) ** 2


def orpo(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    odds_ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
    return -chosen.mean - how.beta * jax.nn.log_sigmoid(odds_ratio)


def simpo(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    return -jax.nn.log_sigmoid(how.beta * (chosen.mean - rejected.mean) - how.margin)


def kto(answers: Answers, is_good: jax.Array, kl: jax.Array, how: How) -> jax.Array:
    """is_good: bool, of each answer. kl: of `divergence`, one for all or one for each."""
    above = how.beta * (answers.ratio - kl)
    good = how.desirable * (1 - jax.nn.sigmoid(above))
    return jnp.where(is_good, good, how.undesirable * (1 - jax.nn.sigmoid(-above)))


def divergence(total: jax.Array, number: jax.Array) -> jax.Array:
    """kl of KTO: the mean of r over so many mismatched answers, which `total` is the sum of; not below 0, and without a gradient."""
    return jnp.maximum(jax.lax.stop_gradient(total / jnp.maximum(number, 1)), 0.0)


# The losses of DPO, by the value of preference.loss.
LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "cdpo": cdpo, "robust": robust, "hinge": hinge, "ipo": ipo}


def _scaled(chosen: Answers, rejected: Answers, how: How) -> jax.Array:
    return how.beta * (chosen.ratio - rejected.ratio)


def _both(chosen: Answers, rejected: Answers, how: How) -> tuple[jax.Array, jax.Array]:
    """-log s of b delta, and of the same as if the two answers had been mixed up."""
    scaled = _scaled(chosen, rejected, how)
    return -jax.nn.log_sigmoid(scaled), -jax.nn.log_sigmoid(-scaled)


def _log_odds(mean: jax.Array) -> jax.Array:
    """log(P / (1 - P)) of P = exp(mean), as exact near 0 as near 1 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    mean = jnp.minimum(mean, CERTAIN)
    near = mean > -jnp.log(2.0)
    # The other branch's argument is made harmless: a gradient that is not a number would come through jnp.where.
    close, far = jnp.where(near, mean, -1.0), jnp.where(near, -1.0, mean)
    return mean - jnp.where(near, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(far)))
