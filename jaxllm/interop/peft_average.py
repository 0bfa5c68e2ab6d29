"""Several adapters of one base as one: the weighted sum of what they add.

An adapter adds s B A to a weight. The mean of two of them is the mean of these products, which is not the product of the means of A and
of B. It is exactly the product of [w1 s1 B1, w2 s2 B2] and [A1; A2], of the summed rank; of a smaller rank it is approximated as well as
that rank can (Eckart and Young 1936) by its largest singular values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.interop import peft_modules
from jaxllm.interop.peft import EMBEDDING_A, EMBEDDING_B, A, Adapter, B, Product
from jaxllm.interop.weights import listing


class Averaged(NamedTuple):
    """errors: module -> what the rank leaves out, as a part of the Frobenius norm of what should be added; error: of all together."""

    adapter: Adapter
    errors: Mapping[str, float]
    error: float


def average(adapters: Sequence[Adapter], shares: Sequence[float], rank: int | None = None) -> Averaged:
    """The sum of the adapters times their shares, of the summed rank, or of this one.

    ValueError for DoRA, whose lengths are no sum, for adapters of modules of different shapes, for tensors that not all of them store
    whole, and for those with shares that do not add up to 1.
    """
    _check(adapters, shares)
    modules = {module: None for adapter in adapters for module in adapter.products}
    sums = {module: _sum(module, adapters, shares, rank) for module in modules}
    first = adapters[0]
    whole = {name: first.shapes[name] for name in first.whole}

    def read(name: str) -> np.ndarray:
        if name in whole:
            return np.sum(
                [share * adapter.read(name).astype(np.float64) for share, adapter in zip(shares, adapters, strict=True)], axis=0
            ).astype(np.float32)
        module = name.partition(".lora_")[0]
        return sums[module].a if name == factors[module][0] else sums[module].b

    factors = {module: next(each for each in adapters if module in each.products).factor_names(module) for module in modules}
    shapes = {
        name: array.shape for module, found in sums.items() for name, array in zip(factors[module], (found.a, found.b), strict=True)
    }
    excludes = any(adapter.excluded for adapter in adapters)
    adapter = Adapter(
        where="the average",
        base=first.base,
        task=first.task,
        targets=tuple(modules) if excludes else peft_modules.union([adapter.targets for adapter in adapters]),
        excluded=(),
        saved=first.saved,
        tied=first.tied,
        fan_in_fan_out=first.fan_in_fan_out,
        rslora=False,
        dora=False,
        dropout_frac=first.dropout_frac,
        products={module: Product(len(found.a), 1.0) for module, found in sums.items()},
        shapes=shapes | whole,
        read=read,
    )
    norm = math.hypot(*(found.norm for found in sums.values())) or 1.0
    errors = {module: found.left / (found.norm or 1.0) for module, found in sums.items()}
    return Averaged(adapter, errors, math.hypot(*(found.left for found in sums.values())) / norm)


class _Sum(NamedTuple):
    """b a, the Frobenius norm of the exact sum, and that of what b a leaves out."""

    a: np.ndarray
    b: np.ndarray
    norm: float
    left: float


def _sum(module: str, adapters: Sequence[Adapter], shares: Sequence[float], rank: int | None) -> _Sum:
    """b a = the sum of share s B A over the adapters that have this module."""
    found = [
        (adapter.factors(module), share) for adapter, share in zip(adapters, shares, strict=True) if module in adapter.products
    ]
    a = np.concatenate([each.a for each, _ in found])
    b = np.concatenate([each.b * (share * each.scale) for each, share in found], axis=1)
    if rank is None:
        return _Sum(a, b, 0.0, 0.0)
    # Both are thin, so that the decomposition of b a is one of a small matrix between two bases.
    left, inner = np.linalg.qr(b.astype(np.float64))
    right, other = np.linalg.qr(a.astype(np.float64).T)
    u, values, v = np.linalg.svd(inner @ other.T)
    root = np.sqrt(values[:rank])
    thin_b, thin_a = left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
    norm, left_out = (float(np.linalg.norm(part)) for part in (values, values[rank:]))
    return _Sum(thin_a.astype(np.float32), thin_b.astype(np.float32), norm, left_out)


def _check(adapters: Sequence[Adapter], shares: Sequence[float]) -> None:
    if dora := [adapter.where for adapter in adapters if adapter.dora]:
        raise ValueError(
            f"{', '.join(dora)}: DoRA, which scales each output of W + s B A; two of them add up to no adapter.\n  Accepted: LoRA.\n"
            "  Average merged weights instead."
        )
    if rows := [adapter.where for adapter in adapters if adapter.tokens]:
        raise ValueError(
            f"{', '.join(rows)}: rows of single tokens (trainable_token_indices), which are not averaged.\n"
            "  Accepted: adapters without them.\n  Average merged weights instead."
        )
    first, *others = adapters
    for other in others:
        differing = [
            f"{name} {list(first.shapes[name])} and {list(other.shapes[name])}"
            for name in first.shapes.keys() & other.shapes.keys()
            if _outer(name, first.shapes[name]) != _outer(name, other.shapes[name])
        ]
        if differing:
            raise ValueError(
                f"{first.where} and {other.where} have modules of different shapes: {listing(sorted(differing))}.\n"
                "  Accepted: adapters of one base.\n  Give adapters that were trained on the same model."
            )
        if first.whole and first.tied != other.tied:
            raise ValueError(
                f"{first.where} and {other.where}: only one of them has ensure_weight_tying.\n  Accepted: both, or none.\n"
                "  Train them alike, or average merged weights."
            )
        if alone := sorted(set(first.whole) ^ set(other.whole)):
            raise ValueError(
                f"{first.where} and {other.where}: only one of them stores {listing(alone)} whole.\n"
                "  Accepted: the same modules_to_save, as the other one's tensors are in the base, which is not read.\n"
                "  Train them alike, or average merged weights."
            )
    if first.whole and not np.isclose(sum(shares), 1, rtol=1e-6):
        raise ValueError(
            f"shares {', '.join(f'{share:g}' for share in shares)} add up to {sum(shares):g}, and {listing(first.whole)} are stored"
            " whole.\n  Accepted: shares that add up to 1, or adapters without modules_to_save.\n  Change the shares."
        )


def _outer(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the rank."""
    return shape[1:] if name.endswith((A, EMBEDDING_A)) else shape[:1] if name.endswith((B, EMBEDDING_B)) else shape
