"""What is said about a hang: stacks of threads, collectives of a program."""

import threading
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxllm.engine import hang


def watched_stacks() -> list[str]:
    """The stacks as another thread sees them, cut into threads."""
    told: list[str] = []
    watching = threading.Thread(target=lambda: told.extend(hang.stacks().split("\n\n")), name="watching")
    watching.start()
    watching.join()
    return told


def test_threads_in_the_same_place_are_told_together() -> None:
    over = threading.Event()

    def wait_here() -> None:
        over.wait()

    threads = [threading.Thread(target=wait_here, name=f"idle_{number}") for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + 30
        while len(idle := [block for block in watched_stacks() if "wait_here" in block]) != 1 or "Event.wait" not in idle[0]:
            assert time.monotonic() < until, idle  # they are on their way there
        blocks = watched_stacks()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert blocks[0].startswith("thread MainThread:\n")
    assert f"{__file__}:" in blocks[0]
    assert all(f"idle_{number}" in idle[0].splitlines()[0] for number in range(3))
    assert idle[0].index("Event.wait") < idle[0].index("wait_here")  # innermost first
    assert not any("watching" in block for block in blocks)


def test_collectives_come_in_program_order_with_bytes_and_groups() -> None:
    """all-gather of 4 x 8 float32, then a permute of one in a loop, then a sum over pairs: as written, not as printed."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)
    def program(x: jax.Array) -> jax.Array:
        everything = jax.lax.all_gather(x, "fsdp", tiled=True)

        def body(_: Any, y: jax.Array) -> jax.Array:
            return jnp.sin(jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]))

        y = jax.lax.fori_loop(0, 5, body, jnp.cos(everything.sum(0, keepdims=True)))
        return jax.lax.psum(y * y, "data")

    lines = hang.collectives(jax.jit(program).lower(jax.ShapeDtypeStruct((4, 8), jnp.float32)).compile().as_text())
    assert [line.split(" (")[0] for line in lines] == [
        "all-gather of 128 B among {{0,1,2,3},{4,5,6,7}}",
        "collective-permute of 32 B among {{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
        "all-reduce of 32 B among {{0,4},{1,5},{2,6},{3,7}}",
    ]
    assert lines[1].endswith(", in a loop")
    assert "all_gather" in lines[0]


# As GPUs and TPUs print them: started and waited for apart, wrapped, with tiled layouts and other ways to write groups.
ASYNC = """
%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64,8]) -> bf16[8,8] {
  ROOT %reduce-scatter.3 = bf16[8,8]{1,0} reduce-scatter(%p), channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add.1
}

%then (p: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = f32[4]{0} all-to-all(%p), channel_id=4, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main.9 (p0: bf16[8,8], p1: f32[4]) -> f32[4] {
  %ag = (bf16[8,8]{1,0:T(8,128)(2,1)}, bf16[64,8]{1,0:T(8,128)(2,1)}) all-gather-start(%p0), replica_groups=[2,8]<=[8,2]T(1,0)
  %agd = bf16[64,8]{1,0} all-gather-done(%ag)
  %rs = ((bf16[64,8]{1,0}), bf16[8,8]{1,0}) async-start(%agd), calls=%wrapped
  %rsd = bf16[8,8]{1,0} async-done(%rs), calls=%wrapped
  %ar = (f32[10]{0}, /*index=1*/pred[3]{0}) all-reduce-start(%x, %y), replica_groups={}, metadata={op_name="jit(step)/sum"}
  %ard = (f32[10]{0}, pred[3]{0}) all-reduce-done(%ar)
  ROOT %c = f32[4]{0} conditional(%i, %p1, %p1), branch_computations={%then, %then.2}
}
"""


def test_collectives_of_other_compilers() -> None:
    assert hang.collectives(ASYNC) == [
        "all-gather of 1.00 KiB among [2,8]<=[8,2]T(1,0)",
        "reduce-scatter of 128 B among [2,8]<=[16]",
        "all-reduce of 43 B among {} (jit(step)/sum)",
        "all-to-all of 16 B among {{0,1}}, in a branch",
    ]


@pytest.mark.parametrize(
    ("count", "shown"), [(hang.LISTED, hang.LISTED), (hang.LISTED + 1, hang.LISTED + 1), (500, hang.LISTED + 1)]
)
def test_a_long_list_loses_its_middle(count: int, shown: int) -> None:
    lines = [line for line in hang.about([f"c{number}" for number in range(count)]).splitlines() if line.startswith("  ")]
    assert len(lines) == shown
    assert (lines[0], lines[-1]) == ("  1. c0", f"  {count}. c{count - 1}")


def test_what_is_not_known_is_said() -> None:
    assert "not compiled yet" in hang.about(None)
    assert "the step has none" in hang.about([])
