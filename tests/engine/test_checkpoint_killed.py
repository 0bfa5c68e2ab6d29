"""A process that is killed while it saves, or loses its power: whatever it had committed is there and intact."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine.checkpoint import Checkpoints

# A process that saves without pause, is killed at a random moment, five times; each new one first verifies what it finds.
KILLED = """
import os, random, signal, sys, time, traceback
import jax, jax.numpy as jnp
from jaxllm.engine.checkpoint import Checkpoints

def make(step):
    layers = [{"w": step + jnp.arange(2.0**18)} for _ in range(2)]
    return {"params": {"layers": layers}, "frozen": {"w": jnp.arange(2.0**18)}, "step": jnp.int32(step)}

def child():
    checkpoints = Checkpoints(sys.argv[1], keep_last=2)
    checkpoints.remove_incomplete()
    step = checkpoints.latest() or 0
    if step:
        restored = checkpoints.restore(jax.eval_shape(make, 0), step).tree
        assert int(restored["step"]) == step and bool((restored["params"]["layers"][1]["w"] == step + jnp.arange(2.0**18)).all())
    make_step = jax.jit(make)
    print("found", step, flush=True)
    os.write(ready[1], b".")
    while True:
        step += 1
        checkpoints.save(step, make_step(step))
        print("committed", step - 1, flush=True)

ready = os.pipe()
for seed in range(5):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            traceback.print_exc()
            os.write(ready[1], b".")
            os._exit(1)
    os.read(ready[0], 1)
    time.sleep(random.Random(seed).uniform(0.1, 0.9))
    os.kill(pid, signal.SIGKILL)
    print("killed", os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_kill_9_at_any_moment_loses_no_committed_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=200)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("killed")] == ["killed 9"] * 5, done.stderr
    assert sum(line.startswith("found") for line in lines) == 5, done.stderr
    committed = 0
    for event, number in (line.split() for line in lines):
        assert event != "found" or int(number) >= committed
        committed = max(committed, int(number)) if event == "committed" else committed
    checkpoints = Checkpoints(tmp_path)
    layer_like = {"w": jax.ShapeDtypeStruct((2**18,), jnp.float32)}
    like = {"params": {"layers": [layer_like] * 2}, "frozen": layer_like, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    last = checkpoints.latest()
    assert last is not None and last >= committed > 0
    for step in checkpoints.steps():
        restored = checkpoints.restore(like, step).tree
        np.testing.assert_array_equal(restored["params"]["layers"][1]["w"], step + np.arange(2.0**18, dtype=np.float32))
        np.testing.assert_array_equal(restored["frozen"]["w"], np.arange(2.0**18, dtype=np.float32))


# A process that is killed at the first call of a function of engine/folder.py, or at the second one.
KILLED_WITHIN = """
import os, signal, sys
import jax.numpy as jnp
from jaxllm.engine import folder
from jaxllm.engine.checkpoint import Checkpoints

function, left = sys.argv[2], int(sys.argv[3])
original = getattr(folder, function)

def counting(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(folder, function, counting)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": {"w": jnp.arange(8.0)}, "frozen": {"w": jnp.arange(2.0**18)}})
checkpoints.close()
"""


@pytest.mark.parametrize(
    ("function", "call", "left"),
    [
        ("finish", 1, None),  # while the arrays are written: of both folders there may be something
        ("commit", 1, {"frozen.saving", "1.saving"}),
        ("commit", 2, {"frozen", "1.saving"}),
        ("set_aside", 2, {"frozen", "1.saving"}),
    ],
)
def test_kill_9_around_the_frozen_tree(tmp_path: Path, function: str, call: int, left: set[str] | None) -> None:
    """Without a step the run begins again, perhaps with another frozen tree: what it finds is in nobody's way."""
    done = subprocess.run([sys.executable, "-c", KILLED_WITHIN, str(tmp_path), function, str(call)], check=False, timeout=200)
    assert done.returncode == -9
    assert left is None or {path.name for path in tmp_path.iterdir()} == left
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == []
    assert all(name.startswith(("frozen.saving", "1.saving")) for name in checkpoints.remove_incomplete())
    assert {path.name for path in tmp_path.iterdir()} <= {"frozen"}
    state = {"params": {"w": jnp.arange(8.0)}, "frozen": {"w": -jnp.arange(2.0**18)}}
    checkpoints.save(1, state)
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"frozen", "1"}
    restored = checkpoints.restore(jax.eval_shape(lambda: state)).tree
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_older_checkpoints_go_only_when_the_new_one_would_survive_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    synced = []
    monkeypatch.setattr("jaxllm.engine.folder.sync_directory", lambda path: synced.append((path, checkpoints.steps())))
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.float32(step)})
    checkpoints.close()
    assert synced == [(tmp_path, [1]), (tmp_path, [1, 2])]
    assert checkpoints.steps() == [2]
