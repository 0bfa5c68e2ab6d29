"""Writes rewards.json: the loss of TRL 1.16's RewardTrainer and its gradients (needs trl==1.16.*, torch, transformers, datasets).

  python tests/golden/make_rewards.py

The loss is inside a method, which is called with a stand-in for the trainer, and a stand-in for the model that gives the drawn rewards.
"""

import collections
import json
import types
from pathlib import Path
from typing import Any

import torch
from trl import RewardTrainer

PAIRS = 8


def loss(rewards: torch.Tensor, margin: torch.Tensor | None, centering: float | None) -> dict[str, Any]:
    """Mean loss of pairs, its gradients, and the metrics; `rewards` are those of all chosen answers, then those of the rejected ones."""
    logits = rewards.clone().requires_grad_()
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=types.SimpleNamespace(center_rewards_coefficient=centering),
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": margin}
    value = RewardTrainer.compute_loss(trainer, lambda **given: types.SimpleNamespace(logits=logits[:, None]), inputs)
    value.backward()
    measured = {name: trainer._metrics["eval"][name][0] for name in ("accuracy", "margin")}
    halves = {f"gradients_{name}": half.tolist() for name, half in zip(("chosen", "rejected"), logits.grad.chunk(2), strict=True)}
    return {"margins": margin is not None, "centering": centering or 0.0, "loss": value.item(), **measured, **halves}


def make() -> dict[str, Any]:
    """What rewards.json holds."""
    generator = torch.Generator().manual_seed(0)
    # Rounded to float32, as they are read.
    rewards = (torch.randn(2 * PAIRS, generator=generator) * 3).double()
    margin = (torch.rand(PAIRS, generator=generator) * 3).double()
    return {
        "trl": "1.16",
        "chosen": rewards[:PAIRS].tolist(),
        "rejected": rewards[PAIRS:].tolist(),
        "margin": margin.tolist(),
        "cases": [loss(rewards, m, c) for m in (None, margin) for c in (None, 0.01, 0.3)],
    }


if __name__ == "__main__":
    (Path(__file__).parent / "rewards.json").write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
