"""A model of a few thousand parameters, all parts of its training, and batches to train it on. Compiled steps are kept."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from jaxllm import config as configs
from jaxllm import models, registry
from jaxllm.engine import gradients, state, step
from jaxllm.optim import build, schedules
from jaxllm.parallel import plan as plans
from jaxllm.parallel import region as regions
from jaxllm.parallel import rules

VOCAB, ROWS, LENGTH = 48, 8, 16
BASE = {
    "model.name": "llama",
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.mlp_width": 48,
    "model.vocab_size": VOCAB,
    "model.context_tokens": LENGTH,
    "train.batch_seqs": ROWS,
    "train.loss_chunk_tokens": 32,
    "train.steps": 1000,
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
    "optimizer.learning_rate": 3e-3,
    "parallel.data": 1,
}


@dataclass(frozen=True)
class Training:
    """What `engine/step.py` is given, for one config."""

    config: Any
    plan: Any
    model: Any
    optimizer: Any
    objective: Any
    region: Any
    step: Any

    def abstract(self) -> state.TrainState:
        return state.abstract(self.model, self.optimizer, self.config, self.plan)

    def create(self) -> state.TrainState:
        return state.create(self.model, self.optimizer, self.config, self.plan)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return jax.device_put(batch, self.plan.batch_sharding())


def config_of(overrides: dict[str, Any]) -> Any:
    config = configs.base()
    for key, value in (BASE | overrides).items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    configs.check(config)
    return config


@cache
def _make(overrides: tuple[tuple[str, Any], ...]) -> Training:
    config = config_of(dict(overrides))
    sizes = math.prod(config.parallel[axis] for axis in rules.MESH_AXES)
    plan = plans.make(config, jax.devices()[:sizes])
    model = models.build(config, plan.constrain)
    optimizer = build.make(config, model.axes)
    objective = registry.resolve("objective", config.train.objective)(model, config)
    region = regions.Region(plan, model.axes, tuple(each.path for each in model.stacks))
    found = gradients.make(objective, model, config, region)
    made = step.make(found, optimizer, schedules.make(config), config, region)
    return Training(config, plan, model, optimizer, objective, region, made)


@cache
def _compile(overrides: tuple[tuple[str, Any], ...]) -> step.Compiled:
    training = _make(overrides)
    return step.compile(training.step, training.abstract(), step.abstract_batch(training.config, training.plan))


def make(**overrides: Any) -> Training:
    """Keys of the config with __ for the dot."""
    return _make(_key(overrides))


def compiled(**overrides: Any) -> step.Compiled:
    return _compile(_key(overrides))


def _key(overrides: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key.replace("__", "."), value) for key, value in overrides.items()))


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row, padding behind them, weights that differ from row to row, and nothing at all to learn in row 3."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, ROWS)
    first = rng.integers(1, LENGTH // 2, ROWS)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    segments = np.where(place >= lengths[:, None], 0, np.where(place >= first[:, None], 2, 1)).astype(np.int32)
    positions = np.where(place >= first[:, None], place - first[:, None], place).astype(np.int32)
    weights = (segments > 0) * rng.choice([0.0, 0.5, 1.0], (ROWS, LENGTH), p=[0.2, 0.2, 0.6])
    weights[3] = 0
    return {
        "tokens": ids[:, :-1].copy(),
        "targets": ids[:, 1:].copy(),
        "segments": segments,
        "positions": positions,
        "weights": weights.astype(np.float32),
    }
