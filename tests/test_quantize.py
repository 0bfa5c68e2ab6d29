"""The command that compresses: what it writes opens everywhere, is what the report says, and what does not go together is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_run import write_run

from jaxllm import convert, quantize, runs
from jaxllm.compression import report
from jaxllm.transforms import tree
from jaxllm.transforms.affine import Affine
from jaxllm.transforms.int8 import Int8
from jaxllm.transforms.quantized import Quantized

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--rows=4", "--tokens=32")


def command(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "jaxllm.quantize", *flags], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a scan, one with adapters, and text."""
    path = tmp_path_factory.mktemp("models")
    write_run(path / "run", model__name="llama", model__layers_as="scan")
    write_run(path / "bert", model__name="bert", train__objective="masked_lm")
    (path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{index} is a number, and so is {index * 7}. " * 4}) for index in range(40)), "utf-8"
    )
    return path


def kernels(params: Any) -> list[tuple[str, Any]]:
    found = tree.named_leaves(params, is_leaf=lambda node: isinstance(node, Quantized))
    return [(name, node) for name, node in found if isinstance(node, Quantized)]


def test_a_run_comes_out(folder: Path, tmp_path: Path) -> None:
    """From the command line, with a report of numbers that hold for what was written."""
    text, target = folder / "text.jsonl", tmp_path / "small"
    flags = (f"--model={folder / 'run'}", f"--to={target}", "--method=awq+gptq", "--group=16", "--nosymmetric", "--order=group")
    done = command(*flags, f"--calibrate={text}", f"--evaluate={text}", "--check", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "AWQ, then GPTQ, 4 bits, groups of 16, with zeros, order group" in done.stdout
    assert "check: largest difference of logits 0; " in done.stdout
    run, before = runs.load(target), runs.load(folder / "run")
    found = kernels(run.params)
    assert len(found) == 2 * 7 and all(isinstance(node, Affine) and node.groups is not None for _, node in found)
    assert {np.asarray(node.scale).dtype.name for _, node in found} == {"float16"}
    fields = json.loads((target / report.JSON).read_text("utf-8"))
    assert fields["bytes_after"] == sum(leaf.nbytes for leaf in jax.tree.leaves(run.params))
    assert fields["bytes_before"] == sum(leaf.nbytes for leaf in jax.tree.leaves(before.params))
    assert fields["before"]["metric"] == fields["after"]["metric"] and fields["before"]["loss"] != fields["after"]["loss"]
    assert fields["after"]["tokens_per_sec"] > 0 and len(fields["kernels"]) == 14
    assert (target / report.PNG).is_file() and fields["calibration"] == f"4 rows of 32 tokens of {text}"
    assert sum(each["error"] for each in fields["kernels"]) < 0.9 * sum(each["nearest"] for each in fields["kernels"])
    written = subprocess.run(
        [sys.executable, "-m", "jaxllm.generate", f"--run={target}", "--prompt=a", "--max_tokens=4", "--cache=int8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert written.returncode == 0 and written.stdout.startswith("a"), written.stderr


def compress(folder: Path, target: Path, *given: str, model: str = "run") -> int:
    """In this process."""
    quantize.flags.FLAGS.unparse_flags()
    if "model" not in quantize.flags.FLAGS:
        quantize.define_flags()
    for name in quantize.flags.FLAGS:
        quantize.flags.FLAGS[name].unparse()
    arguments = ["quantize", f"--model={folder / model}", f"--to={target}", *given, *FLAGS]
    quantize.flags.FLAGS(arguments)
    return quantize.main([])


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (("--method=nearest", "--bits=3", "--group=0"), Affine),
        (("--method=nearest", "--bits=8", "--group=0", "--format=compressed-tensors"), Int8),
        (("--method=clip", "--group=32", "--format=gptq", "--force"), Affine),
        (("--method=gptq", "--group=32", "--format=awq", "--nosymmetric", "--force"), Affine),
        (("--method=smoothquant", "--format=compressed-tensors"), Int8),
        (("--method=awq", "--group=32", "--format=compressed-tensors", "--calibrate=samples"), Affine),
    ],
    ids=lambda value: "-".join(part.removeprefix("--") for part in value) if isinstance(value, tuple) else "",
)
def test_formats_open_again_with_the_same_codes(folder: Path, tmp_path: Path, given: tuple[str, ...], kind: type) -> None:
    """--check reloads them; and a directory of another tool is read in its codes."""
    data = () if "--method=nearest" in given or "--calibrate=samples" in given else (f"--calibrate={folder / 'text.jsonl'}",)
    assert compress(folder, tmp_path / "out", *given, *data, "--dtype=float16", "--check") == 0
    if any(flag.startswith("--format") for flag in given):
        imported = runs.read_imported(tmp_path / "out", keep_codes=True)
        params = convert.weights.load(imported).params
    else:
        params = runs.load(tmp_path / "out").params
    found = kernels(params)
    assert {type(node) for _, node in found} == {kind} and len({name for name, _ in found}) == 7


def test_an_encoder(folder: Path, tmp_path: Path) -> None:
    flags = ("--bits=8", "--group=0", f"--calibrate={folder / 'text.jsonl'}", f"--evaluate={folder / 'text.jsonl'}")
    assert compress(folder, tmp_path / "out", *flags, model="bert") == 0
    fields = json.loads((tmp_path / "out" / report.JSON).read_text("utf-8"))
    assert fields["after"]["loss"] == pytest.approx(fields["before"]["loss"], rel=0.02) and "tokens_per_sec" not in fields["after"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--method=gptq",), r"--method gptq without --calibrate[\s\S]*Accepted: a text .*samples; --method nearest"),
        (("--method=smoothquant", "--bits=4", "--calibrate=samples"), r"smoothquant with other codes than 8 bits"),
        # Before the data are looked for.
        (("--method=gptq", "--group=48", "--calibrate=nowhere"), r"--group = 48 does not cut the inputs"),
        (
            ("--method=nearest", "--targets=.*norm.*"),
            r"--targets '.\*norm.\*' selects .*norm/scale[\s\S]*Accepted: a regular expression",
        ),
        (("--method=nf4", "--format=gptq"), r"--format gptq with --method nf4"),
        (("--method=nearest", "--group=32", "--bits=3", "--format=gptq"), r"3"),
    ],
)
def test_what_does_not_go_together_is_named(folder: Path, tmp_path: Path, given: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compress(folder, tmp_path / "out", *given)
    assert list(tmp_path.iterdir()) == []
