"""One of two processes that sum over each other's devices in every step. The data of the second are slow, and then do not come.

python hanging_pair.py PORT PROCESS DIRECTORY
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.engine import hang, watchdog
from jaxllm.engine.loop import Monitor, train

STEP_SECS, SLOW_SECS, HANGING_STEP = 3.0, 0.1, 40
watchdog.COMPARE_SECS = 0.5


class Source:
    """Batches of ones over both processes."""

    def __init__(self, process: int, sharding: NamedSharding, directory: Path):
        self._process, self._sharding, self._directory = process, sharding, directory

    def batch(self, step: int) -> jax.Array:
        if self._process == 1 and step == HANGING_STEP - 1:
            (self._directory / "hangs_since").touch()
            time.sleep(600)
        time.sleep(SLOW_SECS if self._process == 1 else 0.0)
        return jax.make_array_from_callback((2, 3), self._sharding, lambda index: np.ones((1, 3), np.float32))


def main(port: str, process: int, directory: Path) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def update(state: jax.Array, batch: jax.Array) -> Any:
        loss = batch.sum() + state
        scalars = {"loss": loss, "weight": 1.0, "finite": True, "skipped": 0, "skipped_in_a_row": 0, "moved": batch[:1, 0] > 0}
        return state + 1, jax.tree.map(jax.numpy.asarray, scalars)

    state, source = jax.device_put(np.float32(0), everywhere), Source(process, sharding, directory)
    compiled = jax.jit(update, out_shardings=everywhere).lower(state, source.batch(0)).compile()
    with watchdog.Watchdog(directory, step_secs=STEP_SECS, beside_secs=0, process=process, processes=2) as watched:
        watched.collectives = hang.list_collectives(compiled.as_text(), sharding.mesh)
        monitor = Monitor(
            source=source,
            write=lambda row: print(watched.news() or "", end=""),
            message=print,
            log_every_steps=1,
            max_nonfinite_steps=1,
            positions_a_step=1,
            parameter_names=("w",),
            first_moves={},
            tell=watched.step,
        )
        train(compiled, state, source, monitor, (), start=0, total=60, stop=lambda: None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
