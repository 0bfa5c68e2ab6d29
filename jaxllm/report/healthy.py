"""What the metrics of preferences (objectives/preferences.py) look like when all is well, for who sees them for the first time."""

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
