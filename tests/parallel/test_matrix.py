"""A mesh computes what one device does: a few cells of the matrix (docs/matrix.md), all of which `make matrix` runs.

They were chosen so that each mechanism is met once: every family, all five axes, ZeRO-1, 2 and 3, sequence parallelism, key/value heads
that are fewer than `tensor`, ring and Ulysses, fused and split backward passes, one and two stacks in a pipeline, both forms of the layers.
"""

import pytest
from parallel import columns

CELLS = (
    ("bert", "ZeRO-1: data 2, fsdp 4"),
    ("gpt", "ZeRO-2 x CP ring x SP: fsdp 2, seq 2, tensor 2"),
    ("llama", "TP: tensor 4"),
    ("llama", "PP 1F1B x ZeRO-3 x TP: pipe 2, fsdp 2, tensor 2"),
    ("t5", "PP ZB-H1 x DP x CP Ulysses: pipe 2, data 2, seq 2"),
    ("transformer", "PP 1F1B: pipe 4, data 2"),
)

# The same with frozen kernels and adapters: gathered, cut over tensor, and in both kinds of backward pass of a pipeline.
ADAPTED = (
    ("lora", "gpt", "ZeRO-1: data 2, fsdp 4"),
    ("dora", "llama", "ZeRO-3: data 2, fsdp 4"),
    ("lora", "llama", "ZeRO-2 x CP ring x SP: fsdp 2, seq 2, tensor 2"),
    ("dora", "t5", "PP ZB-H1 x DP x CP Ulysses: pipe 2, data 2, seq 2"),
    ("lora", "bert", "PP 1F1B x ZeRO-3 x TP: pipe 2, fsdp 2, tensor 2"),
    ("nf4 lora", "llama", "PP 1F1B x ZeRO-3 x TP: pipe 2, fsdp 2, tensor 2"),
)


@pytest.mark.parametrize(("adapter", "family", "column"), ADAPTED)
def test_a_mesh_trains_adapters_as_one_device_does(adapter: str, family: str, column: str) -> None:
    found = columns.deviations(family, column, adapter)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize(("family", "column"), CELLS)
def test_a_mesh_computes_what_one_device_does(family: str, column: str) -> None:
    found = columns.deviations(family, column)
    assert max(found.values()) <= 1e-5, found
