"""Logits of one fixed batch of random tokens: what two forms of a model are compared by."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxllm import models
from jaxllm.types import Params

ROWS, TOKENS = 2, 64


def of(config: ConfigDict, params: Params) -> np.ndarray:
    """float32 [ROWS, TOKENS (the context, if that is shorter), V] of a model in this form; equal tokens for equal sizes."""
    shape = (ROWS, min(TOKENS, config.model.context_tokens))
    rng = np.random.default_rng(0)
    tokens_BT, inputs_BS = rng.integers(0, config.model.vocab_size, (2, *shape), dtype=np.int32)
    model = models.build(config)
    beside: dict[str, Any] = {"inputs": inputs_BS} if model.encode is not None else {}
    return np.asarray(jax.jit(model.apply)(params, tokens_BT, **beside))


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())
