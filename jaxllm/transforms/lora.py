"""LoRA: a frozen kernel and a trained product of two thin ones beside it (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    y = x W + s drop(x) A B        s = alpha / rank, or alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2)

A is drawn as in PEFT, uniformly in +-1/sqrt(inputs), which is Kaiming's with a = sqrt(5); B is zero, so that the model is at first what
it was. A table of tokens is the kernel of a token as input, whose A is looked up: y = W[t] + s A[t] B. There A is zero and B is drawn, so
that tokens that never occur stay what they were; within +-1/sqrt(D), so that rows move as fast as kernels do, where PEFT's normal
numbers of deviation 1 are sqrt(3 D) times as fast.

PiSSA (Meng et al. 2024, arXiv:2404.02948, eq. 2-4) begins with the largest `rank` singular values of W in A B and the rest of W frozen. W
may be an array or a quantized form. The learning rate of B may be a multiple of A's (LoRA+: Hayou et al. 2024, arXiv:2402.12354).

Letters: R rank; i, o input and output axes of a kernel [i..., o...]; V vocabulary, D width.
"""

import dataclasses
import math
from collections.abc import Callable
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


@partial(
    jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale", "dropout_frac", "outputs_first", "kind")
)
@dataclasses.dataclass(frozen=True)
class Lora:
    """A leaf of the parameter tree. base: the kernel [i..., o...] or its quantized form; a [i..., R]; b [R, o...].

    outputs_first: the base is [o, i], as an output head is. A table of tokens is [V, D]: a [V, R], b [R, D].
    """

    base: Any
    a: Any
    b: Any
    scale: float
    dropout_frac: float
    outputs_first: bool = False
    kind: str = "lora"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def multiply(self, spec: str, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """rng: of the dropout, or None for none."""
        return leaf.einsum(spec, x, self.base) + self.beside(spec, drop(x, self.dropout_frac, rng))

    def beside(self, spec: str, x: jax.Array) -> jax.Array:
        """s x A B; of a table that is read as a head, s x B^T A^T."""
        x_axes, result = spec.partition(",")[0], spec.partition("->")[2]
        summed, new = _parted(spec)
        kept = "".join(axis for axis in x_axes if axis not in summed)
        if self.turned(spec):
            thin = product(f"{x_axes},{RANK}{summed}->{kept}{RANK}", x, self.b)
            return self.scale * product(f"{kept}{RANK},{new}{RANK}->{result}", thin, self.a)
        thin = product(f"{x_axes},{summed}{RANK}->{kept}{RANK}", x, self.a)
        return self.scale * product(f"{kept}{RANK},{RANK}{new}->{result}", thin, self.b)

    def turned(self, spec: str) -> bool:
        """Whether x meets the outputs, as those of a table that is also the output head."""
        summed, new = _parted(spec)
        first, last = (new, summed) if self.outputs_first else (summed, new)
        return f",{first}{last}->" not in spec

    def take(self, ids: jax.Array) -> jax.Array:
        """Float32 rows [*ids.shape, D] of a table of tokens, W[t] + s A[t] B; NaN for an id beyond the vocabulary."""
        rows = leaf.take(self.base, ids, jnp.float32)
        return rows + self.scale * jnp.matmul(leaf.take(self.a, ids, jnp.float32), self.b)

    def map_rows(self, function: Callable[[jax.Array, str], jax.Array], axis: str) -> "Lora":
        """function(rows, their logical axis) of each matrix of a table."""
        base, a, b = function(self.base, axis), function(self.a, axis), function(self.b, "rank")
        return dataclasses.replace(self, base=base, a=a, b=b)

    def dense(self) -> jax.Array:
        """float32, in the shape of the base: the kernel that does the same alone, W + s A B."""
        beside = self.scale * jnp.tensordot(self.a, self.b, axes=1, precision="highest")
        return leaf.dense(self.base) + (beside.T if self.outputs_first else beside)


def _parted(spec: str) -> tuple[str, str]:
    """The axes of the kernel that are summed over, and the others."""
    inputs, _, result = spec.partition("->")
    kernel_axes = inputs.partition(",")[2]
    summed = "".join(axis for axis in kernel_axes if axis not in result)
    return summed, "".join(axis for axis in kernel_axes if axis in result)


def sides(whole: tuple, inputs: int) -> tuple[tuple, tuple]:
    """(what A reads, what B gives) of a shape or of axes; `inputs` as in types.Transform."""
    first, last = whole[: inputs or 1], whole[inputs or 1 :]
    return (last, first) if inputs < 0 else (first, last)


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
            base, a, b = _pissa(kernel, inputs, settings.rank, same["scale"])
        else:
            base, (a, b) = kernel, _zero(kernel.shape, inputs, settings.rank, rng)
        return kind(base, a, b, **same, outputs_first=inputs < 0)

    def axes(axes: Any, inputs: int) -> Lora:
        dense: Axes = axes.codes if isinstance(axes, Quantized) else axes
        read, given = sides(dense, inputs)
        return kind(axes, (*read, "rank"), ("rank", *given), **same, outputs_first=inputs < 0)

    return Transform(settings.targets, apply, axes, adapts=True)


def scale(settings: ConfigDict) -> float:
    """s."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def _zero(shape: tuple[int, ...], inputs: int, rank: int, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A and B, one of which is drawn; the other is 0."""
    read, given = sides(shape, inputs)
    if inputs == 0:
        return jnp.zeros((*read, rank), jnp.float32), _uniform(rng, (rank, *given), given)
    return _uniform(rng, (math.prod(read), rank), read).reshape(*read, rank), jnp.zeros((rank, *given), jnp.float32)


def _uniform(rng: jax.Array, shape: tuple[int, ...], side: tuple[int, ...]) -> jax.Array:
    """Within +-1/sqrt(numbers of this side)."""
    bound = math.prod(side) ** -0.5
    return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)


def _pissa(kernel: Any, inputs: int, rank: int, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(W - s A B, A, B) with s A B the best approximation of W of this rank, its singular values shared out evenly."""
    if isinstance(kernel, Quantized):
        raise ValueError(
            "lora.init = 'pissa' after the kernels were quantized: what is left of them would have to be quantized again.\n"
            "  Accepted: train.transforms with the adapter first, as ('lora', 'nf4'), which quantizes what PiSSA leaves.\n"
            "  Change the order, or lora.init."
        )
    read, given = sides(kernel.shape, inputs)
    rows, columns = math.prod(read), math.prod(given)
    if rank > min(rows, columns):
        raise ValueError(
            f"lora.rank = {rank} with lora.init = 'pissa' for a kernel of {rows} x {columns}.\n  Accepted: up to {min(rows, columns)}.\n"
            "  Lower lora.rank."
        )
    matrix = kernel.T if inputs < 0 else kernel.reshape(rows, columns)
    u, values, v = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    a, b = u[:, :rank] * root, root[:, None] * v[:rank]
    taken = scale * jnp.matmul(a, b, precision="highest")
    rest = kernel - (taken.T if inputs < 0 else taken.reshape(kernel.shape))
    return rest, a.reshape(*read, rank), b.reshape(rank, *given)
