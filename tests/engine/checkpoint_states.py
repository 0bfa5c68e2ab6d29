"""A training state in each form and on each mesh, for tests of checkpoints."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.transforms import tree

LAYERS, WIDTH, WORDS = 3, 8, 320
Tree = Any


def layer(index: int) -> Tree:
    return {
        "attention": {"q": {"kernel": jnp.sin(jnp.arange(WIDTH * 16.0) + index).reshape(WIDTH, 4, 4)}},
        "norm": {"scale": jnp.full((WIDTH,), 1.5 + index, jnp.bfloat16)},
    }


def make_state(seed: int = 0) -> Tree:
    """A state as training has it: unrolled layers, a frozen part with holes, an optimizer's state, scalars, several dtypes."""
    full = {
        "embed": {"tokens": jnp.cos(seed + jnp.arange(1.0 * WORDS * WIDTH)).reshape(WORDS, WIDTH)},
        "layers": [layer(seed + i) for i in range(LAYERS)],
    }
    params, frozen = tree.split(full, {"embed/tokens", "layers/attention/q/kernel"})
    codes = jnp.arange(1023).astype(jnp.int8)
    return {
        "step": jnp.int32(7),
        "params": params,
        "frozen": frozen,
        "opt_state": optax.adamw(1e-3).init(params),
        "codes": codes,
        "none": None,
    }


def stacked(state: Tree) -> Tree:
    return jax.jit(tree.stack_layers)(state)


def place(state: Tree, devices: int) -> Tree:
    """Spread over a mesh of so many devices: the last axis where it divides, whatever the rank."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])

    def one(leaf: jax.Array) -> jax.Array:
        split = leaf.ndim > 0 and leaf.shape[-1] % devices == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, state)


def template(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(one: Tree, other: Tree) -> None:
    """Same structure, dtypes, shardings and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def data_files(checkpoints: Checkpoints, step: int) -> list[Path]:
    return sorted(path for path in (checkpoints.directory / str(step)).rglob("d/*") if path.stat().st_size)


def flip_bit(checkpoints: Checkpoints, step: int, pattern: bytes) -> None:
    """Flips the lowest bit of the first element of an array, in every file that holds it."""
    found = 0
    for path in data_files(checkpoints, step):
        content = bytearray(path.read_bytes())
        where = content.find(pattern)
        if where >= 0:
            content[where] ^= 1
            path.write_bytes(content)
            found += 1
    assert found


def damage_codes(checkpoints: Checkpoints, step: int) -> None:
    """Something that is not a model parameter."""
    flip_bit(checkpoints, step, np.asarray(make_state()["codes"]).tobytes())
