"""Scaling the inputs of kernels, with the inverse in the operation before: the layer computes what it did, and is rounded otherwise.

    y = x W = (x / s) (s W)         (Xiao et al. 2022, arXiv:2211.10438, eq. 3; Lin et al. 2023, arXiv:2306.00978, eq. 4)

x / s costs nothing where x comes out of a norm, of a linear map, or of a product with one: its parameters take 1 / s. It has no place to go
where x comes out of a GELU or SiLU, or where it is also what the residual stream carries on (norms behind a sub-block, as in BERT).
"""

import jax
import jax.numpy as jnp

from jaxllm.compression.walk import kernel_of, with_kernel
from jaxllm.models.architecture import GATED, Architecture
from jaxllm.transforms import tree
from jaxllm.types import Params


def source(arch: Architecture, name: str) -> str | None:
    """What takes 1 / s of the inputs of the kernel `name`, "attention/q": "attention/norm", "attention/v" or "mlp/up"; or None."""
    part, projection = name.split("/")
    if projection in ("q", "k", "v", "gate", "up"):
        reads_norm = arch.norm_order == "pre" and not (part == "cross" and projection != "q")
        return f"{part}/norm" if reads_norm else None
    if projection == "o":
        return f"{part}/v"
    # A product with up is linear in it, and ReLU(x / s) = ReLU(x) / s.
    return "mlp/up" if arch.activation in GATED or arch.activation == "relu" else None


def tie(arch: Architecture, name: str, of_inputs: jax.Array) -> jax.Array:
    """Numbers of the inputs of a kernel, made equal by their mean where one output of the source feeds several: query heads share the
    values of a key/value head."""
    if not name.endswith("/o"):
        return of_inputs
    shared = of_inputs.reshape(arch.kv_heads, -1, arch.head_dim)
    return jnp.broadcast_to(shared.mean(1, keepdims=True), shared.shape).reshape(of_inputs.shape)


def fold(layer: Params, group: tuple[str, ...], into: str, s_I: jax.Array, arch: Architecture) -> Params:
    """The layer with the inputs of the kernels of a group scaled by s, and 1 / s in `into`. s_I: as `tie` leaves it."""
    for name in group:
        kernel = kernel_of(layer, name)
        inputs = 2 if name.endswith("/o") else 1
        shape = (*kernel.shape[:inputs], *(1,) * (kernel.ndim - inputs))
        layer = with_kernel(layer, name, kernel * s_I.reshape(shape))
    path = tuple(into.split("/"))
    before = tree.get(layer, path)
    s = s_I.reshape(arch.kv_heads, -1, arch.head_dim)[:, 0] if into.endswith("/v") else s_I
    # The outputs of a kernel are its last axes; a norm has nothing else.
    return tree.replaced(layer, path, {name: array / s for name, array in before.items()})
