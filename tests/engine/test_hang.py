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


def test_collectives_come_in_program_order_with_bytes_and_axes() -> None:
    """all-gather of 4 x 8 float32, then a permute of one in a loop, then a sum over pairs: as written, not as printed."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)
    def program(x: jax.Array) -> jax.Array:
        everything = jax.lax.all_gather(x, "fsdp", tiled=True)

        def body(_: Any, y: jax.Array) -> jax.Array:
            return jnp.sin(jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]))

        y = jax.lax.fori_loop(0, 5, body, jnp.cos(everything.sum(0, keepdims=True)))
        return jax.lax.psum(y * y, "data")

    text = jax.jit(program).lower(jax.ShapeDtypeStruct((4, 8), jnp.float32)).compile().as_text()
    lines = hang.list_collectives(text, mesh)
    assert [line.split(" (")[0] for line in lines] == [
        "all-gather over fsdp of 128 B",
        "collective-permute over fsdp of 32 B",
        "all-reduce over data of 32 B",
    ]
    assert lines[1].endswith(", 5 times")
    assert "all_gather" in lines[0]


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
