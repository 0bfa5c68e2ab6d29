"""Writes preferences.json: losses and their gradients by the trainers of TRL 1.16 (needs trl==1.16.*, torch, transformers, datasets).

  python tests/golden/make_preferences.py

The losses are inside methods of trainers. These are called with a stand-in for the trainer, and a stand-in for the model that gives the
drawn log-probabilities. Of each pair (or answer) the numbers are its log-probability sums, its loss, and the gradients of that.
"""

import collections
import functools
import json
import types
from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, TOKENS = 8, 12
BETA = 0.1


def keep(x: Any) -> Any:
    return x


ACCELERATOR = types.SimpleNamespace(device="cpu", gather=keep, gather_for_metrics=keep)


def stand_in(**fields: Any) -> types.SimpleNamespace:
    """What the methods read of a trainer."""
    common = {
        "model": types.SimpleNamespace(training=False),
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"eval": collections.defaultdict(list)},
        "_total_train_tokens": 0,
    }
    return types.SimpleNamespace(**(common | fields))


def model_of(log_p: torch.Tensor) -> Any:
    """A model that has these log-probabilities of its labels."""

    def model(**given: Any) -> types.SimpleNamespace:
        nothing = torch.zeros(given["labels"].shape[0], given["labels"].shape[1] - 1)
        outputs = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        return types.SimpleNamespace(log_probs=log_p, **outputs)

    return model


def draw() -> dict[str, torch.Tensor]:
    """Log-probabilities [2 P, T] of chosen and rejected answers of different lengths, 0 where no token is, and sums by the reference."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, TOKENS, (2 * PAIRS,), generator=generator)
    mask = torch.arange(TOKENS) < lengths[:, None]
    log_p = -torch.rand(2 * PAIRS, TOKENS, generator=generator, dtype=torch.float64) * 4 * mask
    reference = log_p.sum(1) + torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64) * 6
    # Near certainty, where 1 - p has to be computed with care.
    log_p[0, :] *= 1e-6
    return {"log_p": log_p, "mask": mask, "reference": reference}


def dpo(loss: str, label_smoothing: float, drawn: dict[str, torch.Tensor]) -> list[list[float]]:
    """[loss, its gradients for the sums of chosen and rejected] of each pair."""
    found = []
    for pair in range(PAIRS):
        which = [pair, PAIRS + pair]
        log_p = drawn["log_p"][which].clone().requires_grad_()
        mask, reference = drawn["mask"][which], drawn["reference"][which]
        # The first token belongs to the prompt.
        completion = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask], dim=1)
        inputs = {
            "input_ids": torch.ones(2, TOKENS + 1, dtype=torch.long),
            "attention_mask": completion,
            "completion_mask": completion,
        }
        inputs |= {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
        trainer = stand_in(
            beta=BETA, label_smoothing=label_smoothing, loss_types=[loss], loss_weights=[1.0], f_divergence_type="reverse_kl"
        )
        trainer.ld_alpha, trainer.use_weighting = None, False
        value = DPOTrainer._compute_loss(trainer, model_of(log_p), inputs, False)
        value.backward()
        found.append([value.item(), log_p.grad[0, 0].item(), log_p.grad[1, 0].item()])
    return found


def cpo(loss: str, drawn: dict[str, torch.Tensor], mean: bool, **fields: Any) -> list[list[float]]:
    """The same of CPOTrainer, whose sums may be differences to a reference, or of means."""
    trainer = stand_in(alpha=0.0, loss_type=loss, **fields)
    found = []
    for chosen, rejected in pairs(drawn, mean):
        value = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
        value.backward()
        found.append([value.item(), chosen.grad.item(), rejected.grad.item()])
    return found


def orpo(drawn: dict[str, torch.Tensor]) -> list[list[float]]:
    """Of ORPOTrainer, whose likelihood term is here that of the chosen answer alone: gradients for the means."""
    found = []
    for chosen, rejected in pairs(drawn, mean=True):
        trainer = stand_in(beta=BETA)
        trainer.odds_ratio_loss = functools.partial(ORPOTrainer.odds_ratio_loss, trainer)
        logits = torch.zeros(1)
        trainer.concatenated_forward = lambda *_, c=chosen, r=rejected, z=logits: (c[None], r[None], z, z, -c)
        value, _ = ORPOTrainer.get_batch_loss_metrics(trainer, None, None)
        value.backward()
        found.append([value.item(), chosen.grad.item(), rejected.grad.item()])
    return found


def pairs(drawn: dict[str, torch.Tensor], mean: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(chosen, rejected) of each pair: mean log-probabilities, or sums less those by the reference."""
    sums = drawn["log_p"].sum(1)
    scores = sums / drawn["mask"].sum(1) if mean else sums - drawn["reference"]
    return [tuple(scores[i].clone().requires_grad_() for i in (pair, PAIRS + pair)) for pair in range(PAIRS)]


def kto(drawn: dict[str, torch.Tensor], shift: float) -> dict[str, Any]:
    """Of KTOTrainer, a batch at once, as its answers share an estimate of the divergence. The rejected answers are the mismatched ones."""
    log_p = drawn["log_p"][:PAIRS].clone().requires_grad_()
    others, labels = drawn["log_p"][PAIRS:], torch.arange(PAIRS) % 3 != 0
    completion, other = (torch.cat([torch.zeros(PAIRS, 1, dtype=torch.bool), mask], dim=1) for mask in drawn["mask"].chunk(2))
    ids = torch.ones(PAIRS, TOKENS + 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": completion, "completion_mask": completion, "label": labels}
    inputs |= {"KL_input_ids": ids, "KL_attention_mask": other, "KL_completion_mask": other}
    inputs |= {"ref_logps": drawn["reference"][:PAIRS], "ref_KL_logps": others.sum(1) - shift}
    trainer = stand_in(beta=BETA, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.5)
    kl_model = model_of(others)
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, kl_model, batch)
    value = KTOTrainer._compute_loss(trainer, model_of(log_p), inputs, False)
    value.backward()
    kl = trainer._metrics["eval"]["kl"][0]
    return {"shift": shift, "kl": kl, "labels": labels.tolist(), "loss": value.item(), "gradients": log_p.grad[:, 0].tolist()}


def make() -> dict[str, Any]:
    """What preferences.json holds."""
    drawn = draw()
    arrays = {"log_p": drawn["log_p"].sum(1), "reference": drawn["reference"], "tokens": drawn["mask"].sum(1)}
    smoothed = {"beta": BETA, "label_smoothing": 0.2}
    return {
        "trl": "1.16",
        "beta": BETA,
        **{name: array.tolist() for name, array in arrays.items()},
        "pairs": {
            "sigmoid": dpo("sigmoid", 0.0, drawn),
            "hinge": dpo("hinge", 0.0, drawn),
            "ipo": dpo("ipo", 0.0, drawn),
            "robust": dpo("robust", 0.2, drawn),
            "cdpo": cpo("sigmoid", drawn, mean=False, **smoothed),
            "orpo": orpo(drawn),
            "simpo": cpo("simpo", drawn, mean=True, beta=2.0, simpo_gamma=0.5, label_smoothing=0.0),
        },
        "kto": [kto(drawn, shift) for shift in (0.7, -0.7)],
    }


if __name__ == "__main__":
    (Path(__file__).parent / "preferences.json").write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
