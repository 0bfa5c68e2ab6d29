"""What the metrics of preferences (objectives/preferences.py, rewards.py) look like when all is well, for who is new to them."""

from collections.abc import Mapping

HEALTHY: Mapping[str, str] = {
    "loss": "falls; dpo begins at ln 2 = 0.6931 (sigmoid), where the model is its reference, and kto at 0.5",
    "accuracy": "pairs whose chosen answer has the higher reward; dpo begins at 0 (equal rewards) or by rounding anywhere, and rises",
    "margin": "chosen less rejected reward; rises. Where it grows fast and the validation loss does not fall, the model overfits",
    "chosen_reward": "may fall, as only the margin is trained; where both fall far, the learning rate is too high or beta too low",
    "rejected_reward": "falls, faster than the chosen one",
    "chosen_logp": "log p of an answer in nats, of orpo and simpo a token; falls slowly in dpo, and falls fast where answers are unlearnt",
    "rejected_logp": "the same of rejected answers; falls faster",
    "kl": "how far the model is from its reference, in nats an answer; 0 at the beginning, rises slowly",
}
# The same of reward models.
REWARDS: Mapping[str, str] = {
    "loss": "-log of the probability that chosen is the better answer; begins near ln 2 = 0.6931 (more with margins), and falls",
    "accuracy": "pairs whose chosen answer has the higher reward; begins near one half and rises; people agree on about 0.73",
    "margin": "chosen less rejected reward; begins near 0 and rises. Where it grows and the validation loss does too, the model overfits",
    "chosen_reward": "only differences are trained: the level of the rewards is free, unless reward.centering holds it near 0",
    "rejected_reward": "below the chosen one",
    "penalty": "reward.centering times the squared sum of a pair's rewards; near 0",
    "calibration_error": "how far probabilities are from the shares of pairs that are right, on average; near 0; rises with overfitting",
}
NAMES = tuple({**HEALTHY, **REWARDS})


def of(objective: str) -> Mapping[str, str]:
    """A line for each metric of the objective."""
    return REWARDS if objective == "reward" else HEALTHY
