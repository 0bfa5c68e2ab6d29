"""LoRA: a frozen kernel and a trained product of two thin ones beside it (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    y = x W + s drop(x) A B        s = alpha / rank, or alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2)

A is drawn as in PEFT, uniformly in +-1/sqrt(inputs), which is Kaiming's with a = sqrt(5); B is zero, so that the model is at first what
it was. PiSSA (Meng et al. 2024, arXiv:2404.02948, eq. 2-4) begins with the largest `rank` singular values of W in A B and the rest of W
frozen. W may be an array or a quantized form. The learning rate of B may be a multiple of A's (LoRA+: Hayou et al. 2024, arXiv:2402.12354).

Letters: R rank; i, o input and output axes of a kernel [i..., o...].
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxllm.transforms import leaf
from jaxllm.transforms.product import product
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Axes, Transform

# Stands for the rank in specs of products, which use the other letters.
RANK = "r"


@partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale", "dropout_frac", "kind"))
@dataclasses.dataclass(frozen=True)
class Lora:
    """A leaf of the parameter tree. base: the kernel [i..., o...] or its quantized form; a [i..., R]; b [R, o...]."""

    base: Any
    a: Any
    b: Any
    scale: float
    dropout_frac: float
    kind: str = "lora"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def multiply(self, spec: str, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """rng: of the dropout, or None for none."""
        return leaf.einsum(spec, x, self.base) + self.beside(spec, drop(x, self.dropout_frac, rng))

    def beside(self, spec: str, x: jax.Array) -> jax.Array:
        """s x A B."""
        inputs, _, result = spec.partition("->")
        x_axes, kernel_axes = inputs.split(",")
        summed = "".join(axis for axis in kernel_axes if axis not in result)
        kept = "".join(axis for axis in x_axes if axis not in summed)
        new = "".join(axis for axis in kernel_axes if axis in result)
        thin = product(f"{x_axes},{summed}{RANK}->{kept}{RANK}", x, self.a)
        return self.scale * product(f"{kept}{RANK},{RANK}{new}->{result}", thin, self.b)

    def dense(self) -> jax.Array:
        """float32 [i..., o...]: the kernel that does the same alone, W + s A B."""
        return leaf.dense(self.base) + self.scale * jnp.tensordot(self.a, self.b, axes=1, precision="highest")


def drop(x: jax.Array, frac: float, rng: jax.Array | None) -> jax.Array:
    """x with a share of its numbers dropped and the others scaled up; x itself without a key."""
    if rng is None or not frac:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - frac, x.shape), x / (1 - frac), jnp.zeros_like(x))


def make(config: ConfigDict) -> Transform:
    """LoRA as config.lora says."""
    return adapter(config, Lora)


def adapter(config: ConfigDict, kind: type[Lora]) -> Transform:
    """The transform of an adapter that has the fields of `Lora`."""
    settings = config.lora
    same: dict[str, Any] = {"scale": scale(settings), "dropout_frac": settings.dropout_frac}

    def apply(kernel: Any, inputs: int, rng: jax.Array) -> Lora:
        if settings.init == "pissa":
            return kind(*_pissa(kernel, inputs, settings.rank, same["scale"]), **same)
        return kind(kernel, *_zero(kernel.shape, inputs, settings.rank, rng), **same)

    def axes(axes: Any, inputs: int) -> Lora:
        dense: Axes = axes.codes if isinstance(axes, Quantized) else axes
        return kind(axes, (*dense[:inputs], "rank"), ("rank", *dense[inputs:]), **same)

    return Transform(settings.targets, apply, axes, adapts=True)


def scale(settings: ConfigDict) -> float:
    """s."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def _zero(shape: tuple[int, ...], inputs: int, rank: int, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    bound = math.prod(shape[:inputs]) ** -0.5
    a = jax.random.uniform(rng, (math.prod(shape[:inputs]), rank), jnp.float32, -bound, bound)
    return a.reshape(*shape[:inputs], rank), jnp.zeros((rank, *shape[inputs:]), jnp.float32)


def _pissa(kernel: Any, inputs: int, rank: int, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(W - s A B, A, B) with s A B the best approximation of W of this rank, its singular values shared out evenly."""
    if isinstance(kernel, Quantized):
        raise ValueError(
            "lora.init = 'pissa' after the kernels were quantized: what is left of them would have to be quantized again.\n"
            "  Accepted: train.transforms with the adapter first, as ('lora', 'nf4'), which quantizes what PiSSA leaves.\n"
            "  Change the order, or lora.init."
        )
    shape = kernel.shape
    rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    if rank > min(rows, columns):
        raise ValueError(
            f"lora.rank = {rank} with lora.init = 'pissa' for a kernel of {rows} x {columns}.\n  Accepted: up to {min(rows, columns)}.\n"
            "  Lower lora.rank."
        )
    u, values, v = jnp.linalg.svd(kernel.astype(jnp.float32).reshape(rows, columns), full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    a, b = u[:, :rank] * root, root[:, None] * v[:rank]
    rest = kernel - (scale * jnp.matmul(a, b, precision="highest")).reshape(shape)
    return rest, a.reshape(*shape[:inputs], rank), b.reshape(rank, *shape[inputs:])
