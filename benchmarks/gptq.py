"""GPTQ of one layer here, in a plain PyTorch loop written from the paper and, with --qwix, in qwix: milliseconds, in turn.

    python benchmarks/gptq.py [--rounds 5] [--tokens 4096] [--torch_threads N] [--qwix DIRECTORY]

Layers of 576 inputs and 1536 outputs and the other way around (the MLP of SmolLM2-135M), 4 bits, symmetric, groups of 64, blocks of 128,
damping 1 %. The inputs are random and hang together. Ranges of groups are clipped here, and whole on the other sides.
--qwix: a directory that holds the package qwix. Needs torch.

Each round runs all sides one after the other, in this process. What counts are the medians, and the median of the rounds' ratios. Compiling
is left out: every shape runs once before. The error is that of the outputs, as a share of the error of the nearest codes.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxllm.compression import gptq, grid
from jaxllm.transforms.affine import Grid

LAYERS = ((576, 1536), (1536, 576))
GRID, BLOCK, DAMP = Grid(4, 64), 128, 0.01


class Side(NamedTuple):
    """run: what is timed. dense: the kernel [I, O] of what it returns."""

    run: Callable[[], Any]
    dense: Callable[[Any], np.ndarray]


def problem(inputs: int, outputs: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(kernel [I, O], Hessian [I, I])."""
    rng = np.random.default_rng(0)
    mix_II = np.eye(inputs) + 0.4 * rng.normal(size=(inputs, inputs)) / inputs**0.5
    x_NI = rng.normal(size=(tokens, inputs)) @ mix_II * np.exp(0.5 * rng.normal(size=inputs))
    return rng.normal(0, 0.05, (inputs, outputs)).astype(np.float32), (x_NI.T @ x_NI).astype(np.float32)


def make_here(kernel_IO: np.ndarray, hessian_II: np.ndarray) -> Side:
    kernel, hessian = jnp.asarray(kernel_IO), jnp.asarray(hessian_II)

    def run() -> grid.Rounded:
        return jax.block_until_ready(gptq.solve(kernel, hessian, GRID, DAMP, "none", BLOCK))[0]

    return Side(run, lambda rounded: np.asarray(rounded.dense(GRID)))


@torch.no_grad()
def torch_gptq(weight_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of Frantar et al. 2022, arXiv:2210.17323: the dense weight [O, I]."""
    weight_OI, hessian_II, dense_OI = weight_OI.clone(), hessian_II.clone(), torch.zeros_like(weight_OI)
    inputs, half = weight_OI.shape[1], GRID.codes // 2
    hessian_II.diagonal().add_(DAMP * hessian_II.diagonal().mean())
    factor_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian_II)), upper=True)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors_OB = torch.zeros(len(weight_OI), stop - start)
        for i in range(start, stop):
            if i % GRID.group == 0:
                scale_O = weight_OI[:, i : i + GRID.group].abs().amax(1) / (half - 0.5)
            column_O, diagonal = weight_OI[:, i], factor_II[i, i]
            dense_OI[:, i] = (column_O / scale_O).round().clamp(-half, half - 1) * scale_O
            error_O = (column_O - dense_OI[:, i]) / diagonal
            weight_OI[:, i + 1 : stop] -= error_O[:, None] * factor_II[i, i + 1 : stop]
            errors_OB[:, i - start] = error_O
        weight_OI[:, stop:] -= errors_OB @ factor_II[start:stop, stop:]
    return dense_OI


def make_torch(kernel_IO: np.ndarray, hessian_II: np.ndarray) -> Side:
    weight, hessian = torch.tensor(kernel_IO).T.contiguous(), torch.tensor(hessian_II)
    return Side(lambda: torch_gptq(weight, hessian), lambda dense_OI: dense_OI.T.numpy())


def make_qwix(directory: str) -> Callable[[np.ndarray, np.ndarray], Side]:
    sys.path.append(directory)
    core, qarray = (importlib.import_module(name) for name in ("qwix.contrib.gptq_core", "qwix._src.core.qarray"))
    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,), tiled_axes={1: GRID.group}, calibration_method="absmax")

    def make(kernel_IO: np.ndarray, hessian_II: np.ndarray) -> Side:
        weight, hessian = jnp.asarray(kernel_IO.T), jnp.asarray(hessian_II)

        def run() -> Any:
            return jax.block_until_ready(core.quantize_weight(weight, hessian, how, BLOCK, DAMP))[0]

        return Side(run, lambda codes: np.asarray(qarray.dequantize(codes)).T)

    return make


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="inputs that the Hessian is a sum over")
    parser.add_argument("--torch_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--qwix", help="a directory that holds the package qwix")
    args = parser.parse_args()
    torch.set_num_threads(args.torch_threads)
    sides = {"jaxllm": make_here, "torch": make_torch} | ({"qwix": make_qwix(args.qwix)} if args.qwix else {})
    print(f"{'inputs':>6} {'outputs':>7} {'side':>7} {'ms':>9} {'ratio to jaxllm':>16} {'error':>6}")
    for inputs, outputs in LAYERS:
        kernel, hessian = problem(inputs, outputs, args.tokens)
        nearest = np.asarray(grid.round_to_nearest(kernel, GRID).dense(GRID))
        made = {name: make(kernel, hessian) for name, make in sides.items()}
        errors = {name: float(grid.squared_error(kernel, side.dense(side.run()), hessian)) for name, side in made.items()}
        rounds = [{name: seconds(side.run) for name, side in made.items()} for _ in range(args.rounds)]
        for name in made:
            milliseconds = statistics.median(each[name] for each in rounds) * 1e3
            ratio = statistics.median(each[name] / each["jaxllm"] for each in rounds)
            share = errors[name] / float(grid.squared_error(kernel, nearest, hessian))
            print(f"{inputs:6} {outputs:7} {name:>7} {milliseconds:9.1f} {ratio:16.2f} {share:6.3f}", flush=True)


if __name__ == "__main__":
    main()
