"""Which 1 % of the inputs of each kernel is worth full precision: AWQ's own lesson (Lin et al. 2023, arXiv:2306.00978, table 1).

    python benchmarks/salient_channels.py --model MODEL --calibrate TEXT --evaluate TEXT [--bits 3] [--groups 0 64]

All kernels are rounded to the nearest code, and then the weights of 1 % of the inputs are put back as they were: of those with the largest
mean |x| on the calibration data, with the largest norm of their weights, or of any. Prints the perplexity of each choice.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import evaluate, runs
from jaxllm.compression import calibration, grid, methods, walk
from jaxllm.engine import compilation
from jaxllm.transforms import tree
from jaxllm.transforms.affine import Grid
from jaxllm.types import Batch, Model, Params

KEPT_FRAC = 0.01
# (number of the layer, name of a kernel in it) -> mean |x| of its inputs, [I].
Sizes = dict[tuple[int, str], jax.Array]
# Of an input: (mean |x| [I], weights [I, O], a generator) -> how much it is worth to keep it, [I].
WORTH: dict[str, Callable[[jax.Array, jax.Array, np.random.Generator], Any]] = {
    "mean |x|": lambda size_I, kernel_IO, rng: size_I,
    "norm of the weights": lambda size_I, kernel_IO, rng: jnp.linalg.norm(kernel_IO, axis=1),
    "any": lambda size_I, kernel_IO, rng: rng.random(len(kernel_IO)),
}


def measure_sizes(model: Model, params: Params, batches: Sequence[Batch]) -> Sizes:
    """What the kernels read in the dense model: no layer is changed on the way, so that no choice depends on what rounding did."""
    found: Sizes = {}

    def note(layer: Params, site: walk.Site) -> Params:
        for group in site.groups:
            read = site.statistics(layer, group)
            found.update({(site.number, name): read.absolute_I / read.tokens for name in group})
        return layer

    walk.walk(model, copy(params), batches, note)
    return found


def rounded(kernel_IO: jax.Array, given: Grid, worth_I: Any | None) -> jax.Array:
    """The nearest codes, dense, but for the inputs that are worth most."""
    dense_IO = grid.round_to_nearest(kernel_IO, given).dense(given)
    if worth_I is None:
        return dense_IO
    kept = jnp.argsort(-jnp.asarray(worth_I))[: max(1, round(KEPT_FRAC * len(kernel_IO)))]
    return dense_IO.at[kept].set(kernel_IO[kept])


def compress(model: Model, params: Params, sizes: Sizes, given: Grid, choice: str | None) -> Params:
    """The parameters with all kernels of the layers rounded; choice: of WORTH, None to keep no input."""
    rng, number, params = np.random.default_rng(0), 0, copy(params)
    for stack in model.stacks:
        layers = walk.Layers(tree.get(params, stack.path))
        for index in range(stack.layers):
            layer = layers.take(index)
            for name in (name for name in tree.names(layer) if name.endswith("/kernel")):
                kernel = methods.kernel_of(layer, name)
                kernel_IO = grid.matrix(kernel, methods.inputs_of(name))
                worth_I = None if choice is None else WORTH[choice](sizes[number, name], kernel_IO, rng)
                layer = methods.with_kernel(layer, name, rounded(kernel_IO, given, worth_I).reshape(kernel.shape))
            layers.put(index, layer)
            number += 1
        tree.put(params, stack.path, layers.after)
    return params


def copy(params: Params) -> Params:
    """Another tree of the same arrays: layers are put in place."""
    return jax.tree.map(lambda leaf: leaf, params)


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
    sizes = measure_sizes(run.model, run.params, calibration.make(run, args.calibrate, args.rows, args.tokens, seed=0).batches)

    def measure(params: Params) -> dict[str, Any]:
        return evaluate.evaluate_source(dataclasses.replace(run, params=params), args.evaluate)

    dense = measure(run.params)
    print(f"{dense['metric']}, {dense['tokens']:,} tokens: {dense['perplexity']:.3f}", flush=True)
    print(f"{'group':>6} {'kept in full precision':24} {'perplexity':>10}")
    for group in args.groups:
        given = Grid(args.bits, group, symmetric=False)
        for choice in (None, *WORTH):
            found = measure(compress(run.model, run.params, sizes, given, choice))
            kept = f"1 % by {choice}" if choice else "none"
            print(f"{group or 'all':>6} {kept:24} {found['perplexity']:10.3f}", flush=True)


if __name__ == "__main__":
    main()
