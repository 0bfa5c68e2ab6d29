"""Which config makes the kernels of a quantized directory quantized here, too, with its own codes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.interop.packed.codes import Codes, NormalFloat
from jaxllm.interop.packed.dense import Dense
from jaxllm.transforms import nf4, quantized
from jaxllm.transforms.affine import Grid

FORMS = {3: "int3", 4: "int4", 8: "int8"}


class Kernel(NamedTuple):
    """tensors: the names of those in the files that hold a parameter, one a layer. shape: of one layer. inputs: axes that are summed over.

    joined: a tensor holds other parameters beside it.
    """

    tensors: Sequence[str]
    shape: tuple[int, ...]
    inputs: int
    joined: bool


def plan(tensors: Dense, kernels: Mapping[str, Kernel]) -> Mapping[str, Any] | None:
    """Fields of the config ("train.transforms", "quant.group", ...), or None where no transform here has such codes.

    kernels: path name -> all that a transform can take. None, too, where a kernel is quantized in some layers alone.
    """
    quantized_ones = {
        name: {tensors.is_quantized(tensor) for tensor in kernel.tensors} for name, kernel in kernels.items() if kernel.inputs
    }
    chosen = {name: kernels[name] for name, which in quantized_ones.items() if True in which}
    if not chosen or any(len(quantized_ones[name]) > 1 for name in chosen):
        return None
    first = tensors.codes(next(iter(chosen.values())).tensors[0])
    assert first is not None
    fields = _normal_float(first, chosen) if isinstance(first, NormalFloat) else _grid(first, tensors, chosen)
    return None if fields is None else fields | {"quant.targets": "|".join(chosen)}


def _grid(first: Codes, tensors: Dense, kernels: Mapping[str, Kernel]) -> dict[str, Any] | None:
    settings = tensors.settings
    grid = Grid(first.bits, settings.group, settings.symmetric, settings.ordered)
    if first.bits not in FORMS or not all(_cuts(kernel, grid) for kernel in kernels.values()):
        return None
    return {
        "train.transforms": (FORMS[first.bits],),
        "quant.group": settings.group or -1,
        "quant.symmetric": settings.symmetric,
        "quant.ordered": settings.ordered,
        "quant.activations": "int8" if settings.rounds else "float",
        "quant.scale_dtype": first.scale.dtype.name,
    }


def _cuts(kernel: Kernel, grid: Grid) -> bool:
    """Whether the groups are boxes of the kernel's inputs."""
    every = int(np.prod(kernel.shape[: kernel.inputs]))
    unit = quantized.unit(grid.bits)[0]
    return quantized.scale_shape(kernel.shape, kernel.inputs, grid.group or every, unit) is not None


def _normal_float(first: NormalFloat, kernels: Mapping[str, Kernel]) -> dict[str, Any] | None:
    nested = first.nested
    same = first.block == nf4.BLOCK and np.array_equal(first.table, nf4.TABLE)
    if nested is not None:
        same = same and nested.block == nf4.SCALES and np.array_equal(nested.table, nf4.DYNAMIC)
    if not same or any(quantized.scale_shape(kernel.shape, kernel.inputs, nf4.BLOCK) is None for kernel in kernels.values()):
        return None
    # Runs of 256 scales go on from one kernel of a tensor into the next one: then each gets its scales as numbers.
    return {
        "train.transforms": ("nf4",),
        "quant.double": nested is not None and not any(kernel.joined for kernel in kernels.values()),
    }
