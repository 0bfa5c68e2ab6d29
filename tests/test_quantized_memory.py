"""Opened quantized models: they hold the codes, take the memory that the format promises while they write, and compute the same."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_run import write_run

from jaxllm import logits, runs
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.decode import batching, generate, network
from jaxllm.interop import directory, weights
from jaxllm.ops.sampling import Settings
from jaxllm.report import units
from jaxllm.transforms import leaf
from jaxllm.transforms.int8 import Int8
from jaxllm.transforms.quantized import Quantized
from jaxllm.types import Model, Params

sys.path.append(str(Path(__file__).resolve().parent / "interop"))

from foreign_models import MODELS, make  # noqa: E402
from quantized_models import quantize  # noqa: E402

# Large enough for kernels to be more than all the rest; groups of 64 divide every input.
SIZES = {"width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp_width": 512, "layers": 4, "context_tokens": 32}
# packing: (kind, its grid, bits a weight: code, scale / group, zero / group)
FORMATS: dict[str, tuple[str, dict[str, Any], float]] = {
    "pack-quantized": ("grid", {"group": 64}, 4 + 16 / 64),
    "gptq": ("grid", {"group": 64, "ordered": True}, 4 + 16 / 64),
    "awq": ("grid", {"group": 64, "symmetric": False}, 4 + (16 + 8) / 64),
    "nf4": ("double", {}, 4 + 8 / 64 + 32 / (64 * 256)),
    "int-quantized": ("int8", {}, 8),
}
ONE_TOKEN = 64  # bytes of scalars: the token, counters


def write(path: Path, kind: str, packing: str, grid: dict[str, Any]) -> Model:
    """A directory of a LLaMA in float16, and so are scales."""
    tokenizer = ByteTokenizer()
    _, model, params = make(MODELS["llama"][1], **SIZES, vocab_size=tokenizer.vocab_size)

    def one(path: Any, kernel: jax.Array) -> Any:
        key = jax.tree_util.keystr(path)
        if "layers" not in key or "kernel" not in key:
            return kernel
        return quantize(kernel / 16, 2 if "'o'" in key else 1, kind, **grid)

    made = jax.tree.map_with_path(one, params)
    directory.write(path, made, model.config, tokenizer, {}, packing=packing, dtype="float16", forced=True)
    return model


def is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def size(tree: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(tree))


def decode_memory(model: Model, params: Params, vocab_size: int) -> tuple[Any, int]:
    """(what the compiler says of the loop over new tokens, bytes of what the loop carries)."""
    batch = batching.pad([[1]], batching.streams([[1]]), [8], model.config.context_tokens)
    program = generate.Program(network.make(model, batch, vocab_size, None), Settings(temperature=0.0))
    state = jax.eval_shape(
        lambda params: generate._start(program, params, batch, np.array([], np.int32), np.uint32(0), None), params
    )
    compiled = generate._continue.lower(program, params, state, np.int32(8)).compile()
    return compiled.memory_analysis(), sum(
        array.size * (8 if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array.dtype.itemsize)
        for array in jax.tree.leaves(state)
    )


@pytest.mark.parametrize("packing", FORMATS)
def test_a_directory_is_held_in_its_codes(packing: str, tmp_path: Path) -> None:
    kind, grid, bits = FORMATS[packing]
    write(tmp_path, kind, packing, grid)
    run = runs.load(tmp_path, for_decoding=True)
    kernels = [node for node in jax.tree.leaves(run.params, is_leaf=is_quantized) if is_quantized(node)]
    assert len(kernels) == 7 * SIZES["layers"]
    numbers = sum(int(np.prod(kernel.shape)) for kernel in kernels)
    extra = sum(kernel.groups.nbytes for kernel in kernels if getattr(kernel, "groups", None) is not None)
    promised = numbers * bits / 8 + extra
    assert size(kernels) == pytest.approx(promised, rel=0.02 if kind in ("int8", "double") else 1e-9)
    # What is not quantized is what it is in a dense model.
    imported = directory.read(tmp_path)
    dense = weights.load(imported).params
    rest = size(dense) - 4 * numbers
    memory, carried = decode_memory(run.model, run.params, run.tokenizer.vocab_size)
    assert 0 <= memory.argument_size_in_bytes - (size(kernels) + rest + carried) <= ONE_TOKEN
    # Dense kernels are made one at a time: beside all of them in float32, which is what there was before, a few of the largest.
    largest = 4 * max(int(np.prod(kernel.shape)) for kernel in kernels)
    assert memory.temp_size_in_bytes < 4 * largest + carried < 4 * numbers / 3
    # The weights are the same to the bit where scales are multiplied in at once; sums may be in another order.
    params = jax.tree.map(_without_rounding, run.params, is_leaf=is_quantized)
    jax.tree.map(lambda node, array: np.testing.assert_array_equal(leaf.dense(node), array), params, dense, is_leaf=is_quantized)
    found, expected = logits.of(run.config, params), logits.of(imported.config, dense)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def _without_rounding(node: Any) -> Any:
    return dataclasses.replace(node, rounds=False) if isinstance(node, Int8) else node


def test_the_user_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also of a run: 4 bits, and a scale in float32 for groups of 32."""
    fields = {"model__name": "llama", "train__transforms": ("int4",), "quant__group": 32, "train__trainable": ".*norm.*"}
    caplog.set_level("INFO", "absl")
    run = runs.load(write_run(tmp_path / "run", **fields))
    kernels = [node for node in jax.tree.leaves(run.params, is_leaf=is_quantized) if is_quantized(node)]
    rest = size(run.params) - size(kernels)
    assert (
        f"kernels in int4, 5 bits a weight; parameters take {units.size(size(run.params))} on the device, of which" in caplog.text
    )
    assert f"{units.size(rest)} is not quantized" in caplog.text
