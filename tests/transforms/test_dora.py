"""DoRA in scanned stacks beside NumPy float64.

Wide enough for the libraries of XLA's CPU backend (YNNPACK), which fuse a product with the sum that reads it: jax 0.10.2 sums what nobody
wrote where the right side of the product is one number, repeated, as B is at first.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import config as configs
from jaxllm.transforms import adapt, dora, int8, leaf

SCALE, LAYERS, ROWS = 1.5, 2, 40
# Inputs, outputs, rank.
SIZES = [(32, 128, 2), (32, 256, 3), (64, 64, 8), (64, 250, 4)]


def settings(rank: int, init: str = "zero") -> Any:
    config = configs.base()
    config.lora.update({"rank": rank, "alpha": SCALE * rank, "init": init, "targets": "layers/.*"})
    config.quant.targets = "layers/.*"
    return config


def close(found: Any, expected: np.ndarray, share: float = 2e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("begins", ["zero", "pissa", "int8"])
@pytest.mark.parametrize(("inputs", "outputs", "rank"), SIZES)
def test_magnitudes_begin_as_the_lengths_of_the_kernels_that_were_given(inputs: int, outputs: int, rank: int, begins: str) -> None:
    """Also of all that PiSSA takes apart, and of what codes stand for."""
    config = settings(rank, "pissa" if begins == "pissa" else "zero")
    transforms = (int8.make(config), dora.make(config)) if begins == "int8" else (dora.make(config),)
    adaptation = adapt.Adaptation({"layers": {"up": ("layers", "embed", "mlp")}}, transforms)
    kernel = np.random.default_rng(0).normal(size=(LAYERS, inputs, outputs)).astype(np.float32)
    for run in (adaptation.params, jax.jit(adaptation.params)):
        node = run({"layers": {"up": kernel}}, jax.random.key(0))["layers"]["up"]
        given = np.asarray(jax.lax.map(leaf.dense, node.base) if begins == "int8" else kernel, np.float64)
        np.testing.assert_allclose(node.magnitude, np.linalg.norm(given, axis=1), rtol=1e-6)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "rank"), SIZES)
def test_scanned_products_and_gradients_are_those_of_the_paper(inputs: int, outputs: int, rank: int, begun: bool) -> None:
    """Liu et al. 2024, eq. 5 and 11; with B as it begins, and drawn."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=(LAYERS, *shape)).astype(np.float32)

    w, a, b, x, g = draw(inputs, outputs), draw(inputs, rank), draw(rank, outputs), draw(ROWS, inputs), draw(ROWS, outputs)
    b, m = 0 * b if begun else b, 1 + abs(draw(outputs))
    node = dora.Dora(w, a, b, SCALE, 0.0, magnitude=m)

    @jax.jit
    def scanned(node: Any, x: jax.Array, g: jax.Array) -> Any:
        def of_layer(_: None, given: Any) -> Any:
            one, x_NI, g_NO = given
            y_NO, backward = jax.vjp(partial(leaf.einsum, "BI,IO->BO"), x_NI, one)
            return None, (y_NO, *backward(g_NO))

        return jax.lax.scan(of_layer, None, (node, x, g))[1]

    y, dx, dnode = scanned(node, x, g)
    w, a, b, x, g, m = (array.astype(np.float64) for array in (w, a, b, x, g, m))
    v = w + SCALE * a @ b
    norm = np.linalg.norm(v, axis=1)
    factor = (m / norm)[:, None]
    dv = x.swapaxes(1, 2) @ (g * factor)
    close(y, factor * (x @ v))
    close(dx, (g * factor) @ v.swapaxes(1, 2))
    close(dnode.a, SCALE * dv @ b.swapaxes(1, 2))
    close(dnode.b, SCALE * a.swapaxes(1, 2) @ dv)
    close(dnode.magnitude, (g * (x @ v)).sum(1) / norm)
