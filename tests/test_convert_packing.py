"""Codes that go from one format of files into another, and out of a run: not one changes."""

import io
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_run import write_run
from rich.console import Console

from jaxllm import convert, runs
from jaxllm.interop import directory, weights
from jaxllm.transforms import leaf
from jaxllm.transforms.quantized import Quantized

sys.path.append(str(Path(__file__).resolve().parent / "interop"))

import quantized_models  # noqa: E402
from foreign_models import MODELS  # noqa: E402


def converted(source: Path, target: Path, packing: str, **options: Any) -> tuple[int, str]:
    """(exit code, what was printed)"""
    stream = io.StringIO()
    code = convert.convert(source, target, "", None, Console(file=stream, width=200), packing=packing, checked=True, **options)
    return code, stream.getvalue()


def weights_of(path: Path) -> Any:
    return weights.load(directory.read(path)).params


@pytest.mark.parametrize(
    ("case", "kind", "grid", "trail"),
    [
        ("llama", "grid", {}, ["gptq", "pack-quantized", "gptq_v2", "awq"]),
        ("bert", "grid", {"ordered": True}, ["gptq", "gptq_v2"]),
        ("gpt2", "nf4", {}, ["nf4", "nf4"]),
        ("llama", "int8", {}, ["pack-quantized", "gptq", "pack-quantized"]),
    ],
)
def test_from_format_to_format(case: str, kind: str, grid: dict[str, Any], trail: list[str], tmp_path: Path) -> None:
    _, model, params = quantized_models.quantized(MODELS[case][1], kind, **grid)
    if kind == "int8":  # GPTQ holds scales in float16
        params = jax.tree.map(lambda x: x.astype("float16").astype("float32") if x.dtype == "float32" else x, params)
    directory.write(tmp_path / "0", params, model.config, None, {}, packing=trail[0], dtype="float32")
    first = weights_of(tmp_path / "0")
    for index, packing in enumerate(trail[1:], 1):
        code, text = converted(tmp_path / str(index - 1), tmp_path / str(index), packing)
        assert code == 0 and "kept in their codes" in text and packing in text
        jax.tree.map(np.testing.assert_array_equal, weights_of(tmp_path / str(index)), first)
        assert packing in set(directory.read(tmp_path / str(index)).tensors.dtypes.values())


def test_out_of_a_run(tmp_path: Path) -> None:
    """Also rounding the other tensors: the check knows what is in codes."""
    run = write_run(tmp_path / "run", model__name="llama", train__transforms=("int4",), quant__group=8, train__trainable=".*norm.*")
    code, text = converted(run, tmp_path / "packed", "pack-quantized")
    assert code == 0 and "pack-quantized" in text
    expected = jax.tree.map(leaf.dense, runs.load(run).params, is_leaf=lambda node: isinstance(node, Quantized))
    jax.tree.map(np.testing.assert_array_equal, weights_of(tmp_path / "packed"), expected)
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    with pytest.raises(ValueError, match=r"the scales of .* are no bfloat16 numbers"):
        convert.convert(run, tmp_path / "half", "", "bfloat16", console, packing="pack-quantized")
    assert not (tmp_path / "half").exists()
    assert convert.convert(run, tmp_path / "dense", "hf", None, console) == 0
    assert set(directory.read(tmp_path / "dense").tensors.dtypes.values()) == {"float32"}


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_files_whose_readers_round_activations(activations: str, tmp_path: Path) -> None:
    """The check rounds them, too, and says what that changes of a model that does not; a file without the rounding has other logits."""
    fields = {"train__transforms": ("int8",), "quant__activations": activations, "train__trainable": ".*norm.*"}
    run = write_run(tmp_path / "run", model__name="llama", **fields)
    code, text = converted(run, tmp_path / "packed", "int-quantized")
    assert code == 0 and "and activations to 8 bits" in text and ": ok" in text
    difference = float(text.partition("largest difference of logits ")[2].partition(",")[0])
    assert difference == 0 if activations == "int8" else difference > 1e-3
    imported = directory.read(tmp_path / "packed", keep_codes=True)
    assert imported.config.quant.activations == "int8"
    code, text = converted(run, tmp_path / "words", "pack-quantized")
    assert code == 0 and "and activations to 8 bits" not in text
    assert (float(text.partition("largest difference of logits ")[2].partition(",")[0]) > 1e-3) == (activations == "int8")


def test_what_packing_does_not_go_with(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no kernel is quantized, and files of gptq are to be written"):
        converted(run, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match=r"--packing gptq with --format gguf.\n  Accepted: --packing with --format hf"):
        convert.convert(run, tmp_path / "x.gguf", "gguf", None, Console(file=io.StringIO()), packing="gptq")
    assert not (tmp_path / "out").exists()
