"""The metrics of a batch on a mesh, without gradients: each device measures its own rows, through the pipeline where there is one."""

from collections.abc import Callable
from typing import Any

from jax.sharding import PartitionSpec

from jaxllm.parallel import pipeline
from jaxllm.parallel.region import Region
from jaxllm.types import Batch, Metrics, Model, Objective, Params


def tokens(function: Callable[[Params, Batch], Any], region: Region) -> Callable[[Params, Batch], Any]:
    """measure(params, batch) -> function(params, batch), numbers a token [B, T], of each device's own rows. Not for a pipeline."""

    def own(params: Params, batch: Batch) -> Any:
        return function(region.open(params), batch)

    return lambda params, batch: region.run(own, (params,), batch, out=region.plan.batch_sharding().spec)


def make(objective: Objective, model: Model, config: Any, region: Region) -> Callable[[Params, Batch], Metrics]:
    """measure(params, batch) -> sums over all rows. Dropout is off. In a pipeline the rows are train.microbatches micro-batches."""
    if region.plan.mesh.shape["pipe"] == 1:

        def own(params: Params, batch: Batch) -> Metrics:
            return region.sum(objective(region.open(params), batch, None)[1])

        return lambda params, batch: region.run(own, (params,), batch, out=PartitionSpec())

    interpreter, chunks = pipeline.make(model, objective, config, region, forward_only=True)

    def own_stages(params: Params, batch: Batch) -> Metrics:
        return region.sum(interpreter.run(params, chunks.nothing(params), batch, None)[2])

    return lambda params, batch: chunks.region.run(own_stages, (chunks.cut(params),), batch, out=PartitionSpec())
