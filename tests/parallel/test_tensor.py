"""Tensor and sequence parallelism by the compiled program: what travels between the devices that share products, and what they hold."""

from functools import cache
from typing import Any

import jax
from parallel import combinations

from jaxllm.parallel import collectives

VOCAB, WIDTH, TOKENS, CHUNK = 160, 32, 16 * 32, 128


@cache
def compiled(sequence: bool) -> tuple[Any, Any]:
    """(plan, program) of the gradients of a LLaMA with 2 key/value heads over 4 devices."""
    sizes = {"parallel__tensor": 4, "parallel__sequence": sequence, "model__layers_as": "scan", "model__vocab_size": VOCAB}
    config = combinations.config_of("llama", train__loss_chunk_tokens=CHUNK, **sizes)
    plan, _, model, found = combinations.make(config)
    state = combinations.start(config, plan, model)
    batch = combinations.place(plan, combinations.batch_of("llama"))
    return plan, jax.jit(lambda state, batch: found(state, batch, None)).lower(state, batch).compile()


def moved(sequence: bool) -> list[collectives.Collective]:
    plan, program = compiled(sequence)
    return [each for each in collectives.read(program.as_text(), plan.mesh) if each.axes == ("tensor",)]


def test_neither_logits_nor_the_head_nor_weights_are_brought_together() -> None:
    """The embedding and the head are cut over the vocabulary; the widest that travels is the residual stream."""
    kernels = {VOCAB * WIDTH, VOCAB // 4 * WIDTH, WIDTH * 32, WIDTH * 64}
    for sequence in (False, True):
        numbers = {size // 4 for each in moved(sequence) for size in each.arrays}
        assert max(numbers) == TOKENS * WIDTH
        assert not numbers & {TOKENS * VOCAB, CHUNK * VOCAB, *kernels}


def test_devices_of_tensor_hold_a_part_of_the_stream_between_blocks() -> None:
    """Of 4 layers whose inputs and norms wait for the backward pass, each device then keeps a quarter."""
    (_, whole), (_, cut) = compiled(False), compiled(True)
    saved = whole.memory_analysis().temp_size_in_bytes - cut.memory_analysis().temp_size_in_bytes
    assert saved > 4 * 2 * TOKENS * WIDTH * 4 * 3 / 4
    kinds = {each.kind for each in moved(True)}
    assert (
        "all-gather" in kinds and sum(TOKENS * WIDTH * 4 in each.arrays for each in moved(True) if each.kind == "all-gather") >= 2
    )
