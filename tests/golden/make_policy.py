"""Writes policy/expected.json beside it: losses of TRL's GRPO trainer and their gradients by log-probabilities, for a few random answers.

    python tests/golden/make_policy.py

needs torch and trl 1.16, which the test that reads the file does not. Each case has "loss" and "gradient" [N, T]; "inputs" has what all of
them share: log_p, old, reference, mask [N, T], advantages [N]. "advantages" are those of "rewards", by scale_rewards.
"""

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer import utils
from trl.trainer.grpo_trainer import GRPOTrainer

OUT = Path(__file__).resolve().parent / "policy" / "expected.json"
ANSWERS, GROUP, TOKENS, MOST_TOKENS, BATCHES = 6, 3, 5, 9, 2
# Of the other batch that was made with this one, whose tokens are in dapo's mean.
OTHER_TOKENS = 11


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    log_p = -rng.exponential(1.0, (ANSWERS, TOKENS))
    lengths = np.array([5, 1, 3, 0, 4, 2])  # one is left out, as a truncated one can be
    return {
        "log_p": log_p,
        "old": log_p + rng.normal(0, 0.3, log_p.shape),
        "reference": log_p + rng.normal(0, 0.5, log_p.shape),
        "mask": (np.arange(TOKENS) < lengths[:, None]).astype(np.float64),
        "advantages": rng.normal(0, 1, ANSWERS),
    }


def trainer(loss: str, beta: float, high: float, log_p: torch.Tensor) -> Any:
    """What GRPOTrainer._compute_loss reads of its trainer."""
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True)
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=BATCHES)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_p, torch.zeros_like(log_p), None),
        _metrics={"train": defaultdict(list)},
        accelerator=accelerator,
        args=args,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=loss,
        max_completion_length=MOST_TOKENS,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )


def case(given: dict[str, np.ndarray], loss: str, beta: float, high: float) -> dict[str, Any]:
    arrays = {name: torch.tensor(array) for name, array in given.items()}
    log_p = arrays["log_p"].clone().requires_grad_()
    nothing = torch.zeros(ANSWERS, TOKENS, dtype=torch.long)
    batch = {
        "prompt_ids": nothing[:, :1],
        "prompt_mask": nothing[:, :1] + 1,
        "completion_ids": nothing,
        "completion_mask": arrays["mask"],
        "advantages": arrays["advantages"],
        "old_per_token_logps": arrays["old"],
        "ref_per_token_logps": arrays["reference"],
        "num_items_in_batch": arrays["mask"].sum() + OTHER_TOKENS,
    }
    total = GRPOTrainer._compute_loss(trainer(loss, beta, high, log_p), None, batch)
    total.backward()
    return {"loss": total.item(), "gradient": log_p.grad.tolist()}


def advantages(rewards: torch.Tensor) -> dict[str, list]:
    """As GRPOTrainer._generate_and_score_completions makes them, in its words, of its own standard deviation."""
    grouped = rewards.view(-1, GROUP)
    centered = rewards - grouped.mean(1).repeat_interleave(GROUP)
    group, batch = utils.nanstd(grouped, dim=1).repeat_interleave(GROUP), utils.nanstd(rewards).expand_as(rewards)
    found = {"group": centered / (group + 1e-4), "batch": centered / (batch + 1e-4), "none": centered}
    return {scale: values.view(-1, GROUP).tolist() for scale, values in found.items()}


def make() -> dict[str, Any]:
    """What expected.json holds."""
    given = inputs()
    rewards = torch.tensor(np.random.default_rng(1).choice([0.0, 0.5, 1.0], ANSWERS))
    cases = {
        f"{loss} {beta} {high}": case(given, loss, beta, high)
        for loss, (beta, high) in product(("grpo", "bnpo", "dr_grpo", "dapo"), ((0.0, 0.2), (0.04, 0.2), (0.1, 0.28)))
    }
    return {
        "trl": trl.__version__,
        "most_tokens": MOST_TOKENS,
        "mean_tokens": (float(given["mask"].sum()) + OTHER_TOKENS) / BATCHES,
        "inputs": {name: array.tolist() for name, array in given.items()},
        "rewards": rewards.view(-1, GROUP).tolist(),
        "advantages": advantages(rewards),
        "cases": cases,
    }


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(make(), indent=1) + "\n")
