"""What an objective measures, over held-out rows: for those that are more than the cross-entropy of tokens, of which `perplexity` tells."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxllm.evals import calibration
from jaxllm.parallel import measure as on_mesh
from jaxllm.parallel.region import Region
from jaxllm.types import Batch, Metrics, Model, Objective, Params

Evaluate = Callable[[Params, Iterable[Batch]], dict[str, Any]]


def make_eval(objective: Objective, model: Model, config: Any, unit: str, region: Region | None = None) -> Evaluate:
    """evaluate(params, batches) -> the objective's metrics, each divided by its weight, and the weight of "loss" by the name `unit`; of
    rewards their calibration, too.

    A metric of which there is nothing to measure is left out. Sums first, divides once, in float64. Dropout is off. Compiled once a batch
    shape. Parameters and batches lie on one device, or on the mesh of the region. ValueError if there is nothing to evaluate.
    """
    objective = calibration.added(objective)

    def alone(params: Params, batch: Batch) -> Metrics:
        return objective(params, batch, None)[1]

    measure = jax.jit(alone if region is None else on_mesh.make(objective, model, config, region))

    def evaluate(params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        sums: dict[str, np.ndarray] = {}
        for batch in batches:
            for name, mean in jax.device_get(measure(params, batch)).items():
                sums[name] = sums.get(name, 0) + np.array(mean, np.float64)
        if not sums or not sums["loss"][1]:
            raise ValueError(
                f"nothing to evaluate: the rows hold no {unit}.\n  Accepted: rows with one or more.\n  Give more data, or raise"
                " data.validation_frac."
            )
        row = {name: float(mean[0] / mean[1]) for name, mean in sums.items() if mean.ndim == 1 and mean[1]}
        if "margin" not in row and {"chosen_reward", "rejected_reward"} <= row.keys():
            row["margin"] = row["chosen_reward"] - row["rejected_reward"]
        return row | calibration.told(sums) | {unit: int(sums["loss"][1])}

    return evaluate
