"""What a config's plan says beside what its train step takes on the device that is there: memory, line by line, and speed.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/on_device.py --config configs/sft_llama_8b_qlora.py [--set KEY=VALUE ...]

The state is drawn array by array on the device: codes are random bytes, what is not quantized is normal with deviation 0.02. So no files
are needed, nothing is ever dense, and what the device holds at most is a matter of the step; with train.start the model is read, and its
reading counts too. Batches are random tokens. The next step starts before the loss of one is read, as in training; the first steps are
left out of the times, and the last one, behind which none starts. Of a CPU, whose memory jax does not count, the lines "on the device"
are missing.
"""

import argparse
import ast
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import config as schema
from jaxllm import start
from jaxllm.engine.session import Session, build_session, bytes_by_category, bytes_of
from jaxllm.engine.state import TrainState
from jaxllm.engine.step import Compiled, abstract_batch
from jaxllm.parallel import forms, plan
from jaxllm.transforms import tree
from jaxllm.types import Batch, Params

WARM_UP = 4
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the config, such as lora.rank=8")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    arguments = parser.parse_args()
    config = read(arguments.config, arguments.set)
    session = build_session(config, plan.make(config))
    device = session.plan.mesh.devices.flat[0]
    print(f"{arguments.config} {' '.join(arguments.set)}\n{session.plan.mesh.size} x {device.device_kind}, jax {jax.__version__}")
    print(session.describe())
    began = time.perf_counter()
    state = jax.block_until_ready(make_state(session))
    line("made in", f"{time.perf_counter() - began:.1f} s")
    show_state(session, state)
    show_device(device, "after the state was made")
    compiled = session.compile()
    show_program(session, compiled)
    times, losses = run(session, compiled, state, arguments.steps)
    show_device(device, "after the steps")
    median = statistics.median(times)
    line("steps", f"{median * 1000:,.0f} ms (from {min(times) * 1000:,.0f} to {max(times) * 1000:,.0f})")
    line("speed", f"{session.positions_a_step / median:,.0f} tokens a second")
    line("losses", " ".join(f"{loss:.4f}" for loss in losses))


def read(path: str, assignments: list[str]) -> Any:
    """The config with these fields on one device; an open vocabulary is 32,768."""
    config = schema.load(path)
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        section, _, name = key.rpartition(".")
        try:
            config[section][name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a name, a path
            config[section][name] = value
    config.parallel.data = 1
    schema.check(config)
    return schema.with_vocabulary(config, 32_768)


def make_state(session: Session) -> TrainState:
    if session.config.train.start:
        return session.create(start.load(session, print))
    return session.create(draw(tree.combine(session.abstract.params, session.abstract.frozen)))


def draw(abstract: Params) -> Params:
    """Random arrays of these shapes, one after the other, and of each the slices along its first axis: nothing else is in memory."""
    keys = (jax.random.fold_in(jax.random.key(0), index) for index in itertools.count())
    return jax.tree.map(lambda like: jax.block_until_ready(_drawing(like.shape, like.dtype, like.sharding)(next(keys))), abstract)


@functools.cache
def _drawing(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    def part(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.floating):
            return (0.02 * jax.random.normal(key, shape)).astype(dtype)
        return jax.random.bits(key, shape, jnp.uint8).astype(dtype)

    def whole(key: jax.Array) -> jax.Array:
        if len(shape) < 3:
            return part(key, shape)
        return jax.lax.map(lambda key: part(key, shape[1:]), jax.random.split(key, shape[0]))

    return jax.jit(whole, out_shardings=sharding)


def batches(session: Session) -> Any:
    """Random tokens, all of which are predicted, in rows of one document each."""
    kinds, rng = abstract_batch(session.config, session.plan), np.random.default_rng(0)
    while True:
        host = {}
        for name, like in kinds.items():
            if name in ("tokens", "targets"):
                host[name] = rng.integers(0, session.config.model.vocab_size, like.shape, dtype=np.int32)
            elif name == "positions":
                host[name] = np.broadcast_to(np.arange(like.shape[1], dtype=like.dtype), like.shape)
            else:
                host[name] = np.ones(like.shape, like.dtype)
        yield {name: jax.device_put(host[name], like.sharding) for name, like in kinds.items()}


def run(session: Session, compiled: Compiled, state: TrainState, steps: int) -> tuple[list[float], list[float]]:
    """(seconds of each step but the first ones and the last one, losses of all)."""
    given: list[Batch] = list(itertools.islice(batches(session), WARM_UP + steps + 1))
    ends, losses, waiting = [], [], None
    for batch in given:
        state, scalars = compiled(state, batch)
        if waiting is not None:
            losses.append(float(waiting["loss"]))
            ends.append(time.perf_counter())
        waiting = scalars
    assert waiting is not None
    losses.append(float(waiting["loss"]))
    ends.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(ends[WARM_UP - 1 : -1])], losses


def show_state(session: Session, state: TrainState) -> None:
    planned = bytes_by_category(session)
    held = {
        "parameters": bytes_of((state.params, state.frozen)),
        "optimizer": bytes_of(state.opt_state),
        "average": bytes_of(state.ema),
    }
    for form in forms.of(tree.combine(session.abstract.params, session.abstract.frozen), tree.names(session.abstract.params)):
        line(f"  {form.what}", f"{form.bytes / MIB:,.1f} MiB planned")
    for name, size in planned.items():
        line(name, f"{size / MIB:,.1f} MiB planned" + (f", {held[name] / MIB:,.1f} held" if name in held else ""))
    line("together", f"{sum(planned.values()) / MIB:,.1f} MiB planned")


def show_program(session: Session, compiled: Compiled) -> None:
    line("compiled in", f"{compiled.compile_secs:.1f} s")
    for name, size in (("arguments", compiled.argument_bytes), ("temporaries", compiled.temp_bytes), ("peak", compiled.peak_bytes)):
        line(f"the program's {name}", f"{size / MIB:,.1f} MiB")
    gradients = bytes_by_category(session)["gradients"]
    line("temporaries beside gradients", f"{(compiled.temp_bytes - gradients) / MIB:,.1f} MiB")


def show_device(device: jax.Device, when: str) -> None:
    if found := device.memory_stats():
        line(when, f"{found['bytes_in_use'] / MIB:,.1f} MiB on the device, at most {found['peak_bytes_in_use'] / MIB:,.1f} so far")


def line(name: str, text: str) -> None:
    print(f"{name:42} {text}", flush=True)


if __name__ == "__main__":
    main()
