"""Which arrays of a checkpoint make up the parameters of a model: averaged or trained ones, frozen ones, or some layers of each."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.engine.record import Leaf

# Trees of the train state that hold trained parameters, best for inference first: the averaged weights, if there are any.
TRAINED = ("ema", "params")
# The one that training does not change, which checkpoints hold once, in a folder of this name.
FROZEN = "frozen"


class Parts:
    """What to read for the parameters `whole` (name -> abstract array, layers stacked) of a checkpoint with these leaves.

    wanted, held: the arrays to read, by their names in the checkpoint, and which layers those hold that hold only some.
    saved: leaves of the checkpoint that should be exactly these; `record.check_fits` compares.
    """

    def __init__(self, whole: Mapping[str, jax.ShapeDtypeStruct], leaves: Mapping[str, Leaf]):
        self._whole = whole
        self._holders = {name: _holders(name, leaves) for name in whole}
        self.wanted: dict[str, jax.ShapeDtypeStruct] = {}
        self.held: dict[str, tuple[int, ...]] = {}
        for name, like in whole.items():
            parts = {holder: leaves[holder].layers for holder in self._holders[name] if holder in leaves}
            layers = [layer for held in parts.values() for layer in held]
            # Where layers are missing it is all of them that are wanted, which does not fit and is said.
            if layers and sorted(layers) == list(range(like.shape[0])):
                self.held |= parts
                for holder, held in parts.items():
                    shape = (len(held), *like.shape[1:])
                    self.wanted[holder] = jax.ShapeDtypeStruct(shape, like.dtype, sharding=like.sharding)
            else:
                self.wanted |= dict.fromkeys(self._holders[name], like)
        self.saved = {name: leaves[name] for name in self.wanted if name in leaves}
        for name, leaf in leaves.items():
            tree, _, parameter = name.partition("/")
            if tree in ("params", FROZEN) and parameter not in whole:
                self.saved[name] = leaf

    def join(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Name -> parameter, of the arrays that were read; parts of a stack are put together in the order of the layers."""
        return {
            name: self._join(like, [(arrays[holder], self.held.get(holder, ())) for holder in self._holders[name]])
            for name, like in self._whole.items()
        }

    def _join(self, like: jax.ShapeDtypeStruct, parts: list[tuple[jax.Array, Any]]) -> jax.Array:
        if len(parts) == 1:
            return parts[0][0]
        order = np.argsort([layer for _, held in parts for layer in held])
        return jax.device_put(jnp.concatenate([array for array, _ in parts])[order], like.sharding)


def _holders(name: str, leaves: Mapping[str, Leaf]) -> list[str]:
    """Names under which the checkpoint holds a model parameter, or layers of it; that of the trained one if it holds none."""
    trained = [full for tree in TRAINED if (full := f"{tree}/{name}") in leaves]
    frozen = [full for full in (f"{FROZEN}/{name}",) if full in leaves]
    return trained[:1] + frozen or [f"params/{name}"]
