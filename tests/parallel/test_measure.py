"""The metrics of a batch on a mesh are those of one device."""

from typing import Any

import jax
import numpy as np
import pytest
from parallel import combinations

from jaxllm import registry
from jaxllm.parallel import measure
from jaxllm.transforms import tree

PIPE = {"model__layers_as": "scan", "parallel__pipe": 2, "train__microbatches": 4}


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("gpt", PIPE | {"parallel__fsdp": 2, "parallel__schedule": "interleaved"}),
        ("transformer", PIPE | {"parallel__schedule": "zb_h1", "model__dropout_frac": 0.5}),
        ("gpt", {"parallel__data": 2, "parallel__seq": 2, "parallel__fsdp": 2}),
    ],
)
def test_metrics_are_those_of_one_device(family: str, given: dict[str, Any]) -> None:
    """Forwards alone, of frozen and trained parameters alike; dropout is off."""
    config, batch = combinations.config_of(family, **given), combinations.batch_of(family)
    found, expected = _measure(config, batch), _measure(combinations.config_of(family), batch)
    assert found.keys() == expected.keys() == {"loss", "accuracy"}
    for name, mean in expected.items():
        assert found[name].weight == mean.weight == batch["weights"].sum()
        np.testing.assert_allclose(found[name].total, mean.total, rtol=1e-6, err_msg=name)


def _measure(config: Any, batch: dict[str, np.ndarray]) -> Any:
    plan, region, model, _ = combinations.make(config)
    objective = registry.resolve("objective", config.train.objective)(model, config)
    state = combinations.start(config, plan, model)
    measured = jax.jit(measure.make(objective, model, config, region))
    return jax.device_get(measured(tree.combine(state.params, state.frozen), combinations.place(plan, batch)))
