"""A deep and narrow GPT in a pipeline, beside the same on one device, and what its program needs."""

from functools import cache
from typing import Any

import jax
from parallel import combinations

from jaxllm import registry
from jaxllm.parallel import fits
from jaxllm.pipeline.schedule import Schedule

# Sixteen layers can be cut into 8 stages with 2 chunks each.
LAYERS, ROWS, TOKENS = 16, 32, 8
NARROW = {"model__layers": LAYERS, "model__width": 16, "model__heads": 2, "model__mlp_width": 32, "model__layers_as": "scan"}


def config_of(schedule: str, stages: int, microbatches: int, **more: Any) -> Any:
    given = NARROW | {"parallel__pipe": stages, "parallel__schedule": schedule, "train__microbatches": microbatches}
    return combinations.config_of("gpt", **(given | {"train__batch_seqs": ROWS, "model__context_tokens": TOKENS} | more))


def table(config: Any) -> Schedule:
    """The schedule that a decoder's config names."""
    make = registry.resolve("pipeline", config.parallel.schedule)
    return make(config.parallel.pipe, config.train.microbatches, fits.chunks_a_stack(config))


def batch() -> Any:
    return combinations.batch_of("gpt", ROWS, TOKENS)


@cache
def _one_device() -> Any:
    return combinations.run(config_of("1f1b", 1, 1), batch())


def deviations(schedule: str, stages: int, microbatches: int) -> dict[str, float]:
    """Of a pipeline from one device, which takes the batch as a whole."""
    return combinations.deviations(combinations.run(config_of(schedule, stages, microbatches), batch()), _one_device())


def lower(config: Any, data: Any) -> Any:
    """The gradients of a batch, lowered."""
    plan, _, model, found = combinations.make(config)
    return jax.jit(found).lower(combinations.start(config, plan, model), combinations.place(plan, data), None)


def temp_bytes(schedule: str, stages: int, microbatches: int, rows: int = 2, tokens: int = 64, width: int = 64) -> tuple[int, int]:
    """(bytes of a stage's input, temporary bytes on a device by the compiler) for micro-batches of so many rows."""
    total = rows * microbatches
    sizes = {"train__batch_seqs": total, "model__context_tokens": tokens, "model__width": width, "model__layers": 2 * stages}
    config = config_of(schedule, stages, microbatches, **sizes)
    memory = lower(config, combinations.batch_of("gpt", total, tokens)).compile().memory_analysis()
    return rows * tokens * width * 4, memory.temp_size_in_bytes
