"""Which 1 % of the inputs of each kernel is worth full precision: AWQ's own lesson (Lin et al. 2023, arXiv:2306.00978, table 1).

    python benchmarks/salient_channels.py --model MODEL --calibrate TEXT --evaluate TEXT [--bits 3] [--groups 0 64]

All kernels are rounded to the nearest code, and then the weights of 1 % of the inputs are put back as they were: of those with the largest
mean |x| on the calibration data, with the largest norm of their weights, or of any. Prints the perplexity of each choice.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import evaluate, runs
from jaxllm.compression import calibration, grid, methods, walk
from jaxllm.compression.statistics import Statistics
from jaxllm.engine import compilation
from jaxllm.transforms.affine import Grid
from jaxllm.types import Params

KEPT_FRAC = 0.01
# Of an input: (its statistics, weights [I, O], a generator) -> how much it is worth to keep it, [I].
WORTH: dict[str, Callable[[Statistics, jax.Array, np.random.Generator], Any]] = {
    "mean |x|": lambda read, kernel_IO, rng: read.absolute_I,
    "norm of the weights": lambda read, kernel_IO, rng: jnp.linalg.norm(kernel_IO, axis=1),
    "any": lambda read, kernel_IO, rng: rng.random(len(kernel_IO)),
}


def rounded(kernel_IO: jax.Array, given: Grid, worth_I: Any | None) -> jax.Array:
    """The nearest codes, dense, but for the inputs that are worth most."""
    dense_IO = grid.round_to_nearest(kernel_IO, given).dense(given)
    if worth_I is None:
        return dense_IO
    kept = jnp.argsort(-jnp.asarray(worth_I))[: max(1, round(KEPT_FRAC * len(kernel_IO)))]
    return dense_IO.at[kept].set(kernel_IO[kept])


def compress(run: runs.Run, batches: Any, given: Grid, choice: str | None) -> Params:
    """The parameters with all kernels of the layers rounded. What each reads is that of the dense model."""
    rng = np.random.default_rng(0)

    def one(layer: Params, site: walk.Site) -> Params:
        result = layer
        for group in site.groups:
            read = site.statistics(layer, group)
            for name in group:
                kernel = methods.kernel_of(layer, name)
                kernel_IO = grid.matrix(kernel, methods.inputs_of(name))
                worth_I = None if choice is None else WORTH[choice](read, kernel_IO, rng)
                result = methods.with_kernel(result, name, rounded(kernel_IO, given, worth_I).reshape(kernel.shape))
        return result

    params = jax.tree.map(lambda leaf: leaf, run.params)
    return walk.walk(run.model, params, batches, one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibrate", "evaluate"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    compilation.use_cache()
    run = runs.load(args.model)
    batches = calibration.make(run, args.calibrate, args.rows, args.tokens, seed=0).batches

    def measure(params: Params) -> dict[str, Any]:
        return evaluate.evaluate_source(dataclasses.replace(run, params=params), args.evaluate)

    dense = measure(run.params)
    print(f"{dense['metric']}, {dense['tokens']:,} tokens: {dense['perplexity']:.3f}", flush=True)
    print(f"{'group':>6} {'kept in full precision':24} {'perplexity':>10}")
    for group in args.groups:
        given = Grid(args.bits, group, symmetric=False)
        for choice in (None, *WORTH):
            found = measure(compress(run, batches, given, choice))
            kept = f"1 % by {choice}" if choice else "none"
            print(f"{group or 'all':>6} {kept:24} {found['perplexity']:10.3f}", flush=True)


if __name__ == "__main__":
    main()
