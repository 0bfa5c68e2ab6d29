"""Recall of each class: counted by NumPy on the logits of `apply`."""

import jax
import numpy as np

from jaxllm import config, models
from jaxllm.evals import recall


def test_counts_targets_with_a_weight() -> None:
    settings = config.base()
    sizes = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 20, "context_tokens": 8}
    settings.model.update({"name": "bert", "head": "tag", "classes": 4, **sizes})
    model = models.build(settings)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    batches = [
        {
            "tokens": rng.integers(0, 20, (3, 8), dtype=np.int32),
            "targets": rng.integers(0, 3, (3, 8), dtype=np.int32),
            "weights": rng.integers(0, 2, (3, 8)).astype(np.float32),
            "segments": rng.integers(0, 3, (3, 8)).astype(np.int32),
        }
        for _ in range(2)
    ]
    expected = np.zeros((4, 2), int)
    for batch in batches:
        best = np.asarray(jax.jit(model.apply)(params, batch["tokens"], segments=batch["segments"])).argmax(-1)
        for guess, target, weight in zip(best.flat, batch["targets"].flat, batch["weights"].flat, strict=True):
            expected[target] += (weight > 0) * np.array([guess == target, 1])
    assert expected[:3, 1].all() and expected[:, 0].any() and not expected[3].any()
    assert recall.measure(model, params, batches) == [tuple(row) for row in expected.tolist()]
