"""What the activations of a decoder move in a step, said beforehand: over `tensor` (Shoeybi et al. 2019, arXiv:1909.08053, section 3)
and, at the end, over `pipe`.

A product whose summed dimension is cut gives each device a part of a sum over all of them. Each sub-block of a layer has one such
product in the forward pass (o, down), and one set of them in the backward pass (of q, k and v; of gate and up), whose results are added
before they are summed over the devices. Where the backward pass runs a layer again, it also runs o again, but not down, whose result
nothing reads.

Around the layers: the rows of the embedding, of which each device has some; per chunk of the loss four numbers a token (the largest
logit, the sum of exponentials, the target's logit, the first of the likeliest tokens) and the gradient of the hidden states.

XLA's CPU compiler does not add before it sums: there the backward pass sums once a product.

In a pipeline each device sends, each tick, activations to the next stage and a gradient to the one before, whether they are of use or not.
"""

import math
from collections.abc import Iterator
from typing import Any

from jaxllm import registry
from jaxllm.parallel.plan import Plan
from jaxllm.parallel.traffic import Row
from jaxllm.types import Model

INTO = "activations, for the forward pass"
BACK = "gradients of activations"
AGAIN = "activations again, for the backward pass"
STAGE = "activations and their gradients, one stage on"
LOSS = "loss: four numbers a token, and the gradient of what enters it"


def over_tensor(plan: Plan, model: Model, config: Any, tokens: int, adds_first: bool = True) -> list[Row] | None:
    """The rows of one step, for so many tokens a row of the batch; None where this is not known, [] where tensor has one device.

    Known for decoders that pre-normalize and are trained in full, on meshes without pipe and seq, with heads that divide and without
    sequence parallelism.
    adds_first: the compiler adds what several products give before it sums over devices.
    """
    if plan.mesh.shape["tensor"] == 1:
        return []
    return list(_rows(plan, model, config, tokens, adds_first)) if _known(plan, model, config) else None


def _known(plan: Plan, model: Model, config: Any) -> bool:
    mesh, arch, train = plan.mesh.shape, model.config, config.train
    plain = arch.family.kind == "decoder" and arch.norm_order == "pre" and arch.head == "lm" and arch.remat.policy != "named"
    losses = train.loss_chunk_tokens > 0 and not train.z_loss and not train.label_smoothing
    whole = mesh["pipe"] == mesh["seq"] == 1 and not plan.parallel.sequence and arch.kv_heads % mesh["tensor"] == 0
    everything = train.trainable in ("auto", ".*") and not train.transforms and not train.frozen_layers
    return plain and losses and whole and everything


def _rows(plan: Plan, model: Model, config: Any, tokens: int, adds_first: bool) -> Iterator[Row]:
    arch, microbatches = model.config, config.train.microbatches
    here = config.train.batch_seqs // microbatches // plan.batch_parts * tokens
    size = here * arch.width * plan.dtype.itemsize

    def row(what: str, arrays: int, bytes: int) -> Row:
        return Row(what, "all-reduce", ("tensor",), plan.mesh.shape["tensor"], microbatches * arrays, microbatches * bytes)

    def activations(what: str, arrays: int) -> Row:
        return row(what, arrays, arrays * size)

    yield activations(INTO, 1 + 2 * arch.layers)
    if arch.remat.policy == "full":
        yield activations(AGAIN, arch.layers)
    # Products that read one input: q, k and v; up and, in a gated MLP, gate.
    readers = 3 + (2 if arch.activation in ("swiglu", "geglu") else 1)
    yield activations(BACK, arch.layers * (2 if adds_first else readers))
    chunks = math.ceil(here / config.train.loss_chunk_tokens)
    padded = chunks * math.ceil(here / chunks)
    yield row(LOSS, 5 * chunks, 4 * padded * (4 + arch.width))


def over_pipe(plan: Plan, model: Model, config: Any, tokens: int) -> list[Row] | None:
    """The rows of one step; None for several stacks or chunks of layers, [] without a pipeline."""
    stages, parallel, microbatches = plan.mesh.shape["pipe"], plan.parallel, config.train.microbatches
    if stages == 1:
        return []
    if len(model.stacks) > 1 or parallel.chunks > 1 or parallel.schedule == "interleaved":
        return None
    schedule = registry.resolve("pipeline", parallel.schedule)(stages, microbatches, 1)
    ticks, parts = schedule.ticks, plan.batch_parts * plan.parts("length") * plan.parts("stream")
    size = config.train.batch_seqs // microbatches * tokens // parts * model.config.width * plan.dtype.itemsize
    return [Row(STAGE, "collective-permute", ("pipe",), stages, 2 * ticks, 2 * ticks * size)]
