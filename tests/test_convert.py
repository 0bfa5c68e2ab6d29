"""`python -m jaxllm.convert`: a run out to files of transformers and back, what travels along, and what is refused."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_gguf
from random_run import write_run
from rich.console import Console

import jaxllm
from jaxllm import config as schema
from jaxllm import convert, evaluate, runs, train
from jaxllm.engine.workdir import Workdir, open_workdir
from jaxllm.interop import directory, gguf_export, gguf_file, gguf_write, weights
from jaxllm.transforms import adapt

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exports") / "new" / "hf"
    assert call(run, target)[0] == 0
    return target


def call(source: Path, target: Path, wanted: str = "", dtype: str | None = None, **options: Any) -> tuple[int, str]:
    """(exit code, what was printed)"""
    out = io.StringIO()
    code = convert.convert(source, target, wanted, dtype, Console(file=out, width=200), **options)
    return code, out.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_goes_out_and_comes_back(run: Path, exported: Path, tmp_path: Path) -> None:
    assert set(contents(exported)) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    code, text = call(exported, tmp_path / "back", checked=True)
    assert code == 0 and "check: largest difference of logits 0, " in text
    for expected in ("LlamaForCausalLM", f"{tmp_path / 'back'} (jaxllm)", "hf/config.json, hf/tokenizer.json", "step 0, float32"):
        assert expected in text
    (model, params, tokenizer), (_, exact, _) = jaxllm.load(tmp_path / "back"), jaxllm.load(run)
    jax.tree.map(np.testing.assert_array_equal, params, exact)
    assert jaxllm.generate(model, params, tokenizer, "The", max_new_tokens=3, temperature=0)
    code, text = call(tmp_path / "back", tmp_path / "again")
    assert code == 0 and "files as they were" in text
    assert contents(tmp_path / "again") == contents(exported)


def test_what_is_not_ours_travels_along(exported: Path, tmp_path: Path) -> None:
    """Tokenizer files and generation settings byte for byte, through a run; keys of config.json that nothing reads, too."""
    source = tmp_path / "source"
    source.mkdir()
    for name, data in contents(exported).items():
        (source / name).write_bytes(data)
    odd = {"special_tokens_map.json": b"{ }", "chat_template.jinja": b"{{ messages }}", "generation_config.json": b'{"top_k":7}\n'}
    for name, data in odd.items():
        (source / name).write_bytes(data)
    (source / "README.md").write_text("left behind")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"eos_token_id": [1, 2]}))
    call(source, tmp_path / "run")
    call(tmp_path / "run", tmp_path / "again")
    again = contents(tmp_path / "again")
    assert {name: again[name] for name in odd} == odd and "README.md" not in again
    assert again["tokenizer.json"] == contents(source)["tokenizer.json"]
    assert json.loads(again["config.json"])["eos_token_id"] == [1, 2]


def test_types_and_shards(exported: Path, tmp_path: Path) -> None:
    code, text = call(exported, tmp_path / "half", "hf", "bfloat16", max_shard_bytes=20_000, checked=True)
    assert (
        code == 0
        and "21 in 6 file(s), bfloat16" in text
        and ", 0 from those of weights rounded to bfloat16" in text
        and "check: largest difference of logits 0," not in text
    )
    # What is read in bfloat16 is written in bfloat16, also through a run.
    call(tmp_path / "half", tmp_path / "run")
    call(tmp_path / "run", tmp_path / "again", max_shard_bytes=20_000)
    assert contents(tmp_path / "again") == contents(tmp_path / "half")


def test_check_finds_a_difference(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor is written with a wrong sign."""
    export = weights.export

    def wrong(*args: Any) -> weights.Exported:
        right = export(*args)
        return right._replace(make=lambda name: right.make(name) * (-1 if name == "model.norm.weight" else 1))

    plan = gguf_export.plan

    def wrong_plan(*args: Any, **options: Any) -> gguf_export.Plan:
        right = plan(*args, **options)
        return right._replace(make=lambda name: right.make(name) * (-1 if name == "output_norm.weight" else 1))

    with monkeypatch.context() as patch:
        patch.setattr(weights, "export", wrong)
        code, text = call(exported, tmp_path / "half", "hf", "bfloat16", checked=True)
        assert code == 2 and ": TOO LARGE, up to " in text
    monkeypatch.setattr(gguf_export, "plan", wrong_plan)
    code, text = call(exported, tmp_path / "half.gguf", "", "q8_0", checked=True)
    assert code == 2 and ": TOO LARGE, up to " in text


def test_gguf_becomes_a_run(tmp_path: Path) -> None:
    tensors = tiny_gguf.stored(tiny_gguf.tensors(np.random.default_rng(0)))
    tiny_gguf.write(tmp_path / "tiny.gguf", tensors, tiny_gguf.model_values() | tiny_gguf.tokenizer_values())
    code, text = call(tmp_path / "tiny.gguf", tmp_path / "run", checked=True)
    assert code == 0 and "LlamaForCausalLM" in text
    (_, ours, _), (_, theirs, tokenizer) = jaxllm.load(tmp_path / "run"), jaxllm.load(tmp_path / "tiny.gguf")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert tokenizer.encode("hello world") == jaxllm.load(tmp_path / "run")[2].encode("hello world")
    assert call(tmp_path / "tiny.gguf", tmp_path / "hf", "hf", checked=True)[0] == 0
    config = schema.load(tmp_path / "run" / "config.json")
    config.data.source = "other.txt"
    with (
        open_workdir(tmp_path / "run") as workdir,
        pytest.raises(ValueError, match=r"was converted from .*\n  Accepted: .*--workdir"),
    ):
        train.run(config, workdir, Console(quiet=True))


def test_a_run_goes_out_as_gguf_and_comes_back(run: Path, tmp_path: Path) -> None:
    """As it was: parameters, greedy text, tokenizer; and out again from there to the same bytes, with and without a run between."""
    target = tmp_path / "new" / "tiny.gguf"
    code, text = call(run, target, checked=True)
    assert code == 0 and f"{target} (gguf)" in text and "check: largest difference of logits 0, 0 from" in text
    assert [path.name for path in target.parent.iterdir()] == ["tiny.gguf"]
    (model, params, tokenizer), (ours, exact, own) = jaxllm.load(target), jaxllm.load(run)
    jax.tree.map(np.testing.assert_array_equal, params, exact)
    greedy = {"max_new_tokens": 12, "temperature": 0}
    assert jaxllm.generate(model, params, tokenizer, "The", **greedy) == jaxllm.generate(ours, exact, own, "The", **greedy)
    assert call(target, tmp_path / "back")[0] == 0
    for source in (target, tmp_path / "back"):
        again = tmp_path / f"from_{source.name}" / "tiny.gguf"
        assert call(source, again)[0] == 0
        assert again.read_bytes() == target.read_bytes()
    # A Hugging Face directory between keeps all but the file that only GGUF has.
    call(target, tmp_path / "hf", "hf")
    assert "vocabulary.gguf" not in contents(tmp_path / "hf")
    call(tmp_path / "hf", tmp_path / "from_hf" / "tiny.gguf")
    assert gguf_file.read(tmp_path / "from_hf" / "tiny.gguf").values == gguf_file.read(target).values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "q8_0"])
def test_types_of_gguf(run: Path, tmp_path: Path, dtype: str) -> None:
    """What is read in a type is written in it again, with the same bytes."""
    code, text = call(run, tmp_path / "tiny.gguf", "gguf", dtype, checked=True)
    assert code == 0 and f"matrices in {dtype}" in text and f", 0 from those of weights rounded to {dtype}" in text
    assert "check: largest difference of logits 0," not in text
    (tmp_path / "again").mkdir()
    call(tmp_path / "tiny.gguf", tmp_path / "again" / "tiny.gguf")
    assert (tmp_path / "again" / "tiny.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()


def test_the_tokenizer_of_a_gguf_file_is_kept(tmp_path: Path) -> None:
    """Directly and through a run, with what is not read here."""
    values = tiny_gguf.tokenizer_values(
        **{"ggml.eot_token_id": 2, "ggml.token_type": [3, 3, 5, *[1] * (len(tiny_gguf.TOKENS) - 3)]}
    )
    tensors = tiny_gguf.stored(tiny_gguf.tensors(np.random.default_rng(0)))
    tiny_gguf.write(tmp_path / "tiny.gguf", tensors, tiny_gguf.model_values() | values)
    call(tmp_path / "tiny.gguf", tmp_path / "run")
    for source in ("tiny.gguf", "run"):
        call(tmp_path / source, tmp_path / "new" / f"{source}.gguf", checked=True)
        found = gguf_file.read(tmp_path / "new" / f"{source}.gguf")
        lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")  # llama.cpp wants a token for each of the 300 rows
        assert {key: value for key, value in found.values.items() if key in values and key not in lists} == {
            key: value for key, value in values.items() if key not in lists
        }
        for key in lists:
            assert found.values[key][: len(tiny_gguf.TOKENS)] == values[key] and len(found.values[key]) == tiny_gguf.VOCAB
        for name, array in tensors.items():
            np.testing.assert_array_equal(found.tensors[name].load(), array)


def test_foreign_models_are_opened_directly(exported: Path, run: Path, tmp_path: Path) -> None:
    opened, original = runs.load(exported), runs.load(run)
    jax.tree.map(np.testing.assert_array_equal, opened.params, original.params)
    assert opened.step == 0 and opened.imported is not None
    before = contents(exported)
    (tmp_path / "text.txt").write_text("Some text.\n" * 9)
    rows = [evaluate.evaluate_source(model, str(tmp_path / "text.txt")) for model in (opened, original)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    evaluate.append(opened, rows[0])
    assert contents(exported) == before
    with pytest.raises(ValueError, match=r"step 3 of '.*hf', which is no run of this package.\n  Accepted: no step"):
        jaxllm.load(exported, 3)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(before[name])
    with pytest.raises(ValueError, match=r"has no tokenizer.\n  Accepted: tokenizer.json, tokenizer.model"):
        jaxllm.load(tmp_path)


def test_classes_of_a_run_become_labels(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = json.loads(Workdir(run).provenance.read_text())
    Workdir(run).provenance.write_text(json.dumps(record | {"labels": ["no", "yes"]}))
    opened = runs.load(run)
    assert opened.classes == ("no", "yes")
    # Many files of language models have labels, too; they say nothing about the rows of an evaluation.
    call(run, tmp_path / "labelled")
    values = json.loads((tmp_path / "labelled" / "config.json").read_text())
    (tmp_path / "labelled" / "config.json").write_text(json.dumps(values | {"id2label": {"0": "LABEL_0"}}))
    assert runs.load(tmp_path / "labelled").classes == ()
    call(run, tmp_path / "hf")
    assert "id2label" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_what_is_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--to {exported} is there already.\n  Accepted: a directory that does not exist"):
        call(run, exported)
    with pytest.raises(ValueError, match=r"--format guf: there is no such format.\n  Accepted: hf, jaxllm, gguf."):
        call(run, tmp_path / "x", "guf")
    for target, wanted in (("x", "gguf"), ("x.gguf", "hf"), ("x.gguf", "jaxllm")):
        with pytest.raises(ValueError, match=rf"--format {wanted} with --to .*{target}.\n  Accepted: a file that ends in .gguf"):
            call(run, tmp_path / target, wanted)
    with pytest.raises(
        ValueError, match=r"--dtype q8_0 with --format hf.\n  Accepted: float32, bfloat16, float16, or --format gguf"
    ):
        call(run, tmp_path / "x", "hf", "q8_0")
    with pytest.raises(ValueError, match=r"--max_shard_size with --format gguf, which is not cut into shards.\n  Accepted: "):
        call(run, tmp_path / "x.gguf", max_shard_bytes=1000)
    with pytest.raises(ValueError, match=r"--dtype bfloat16 with --format jaxllm, whose checkpoints hold float32"):
        call(exported, tmp_path / "x", "", "bfloat16")
    with pytest.raises(ValueError, match=r"no run in '.*nothing': it does not exist[\s\S]*model.safetensors; a .gguf file"):
        call(tmp_path / "nothing", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory.safetensors, "_write_tensor", fail)
    monkeypatch.setattr(gguf_write, "_write_tensor", fail)
    for target in ("hf", "x.gguf"):
        with pytest.raises(OSError, match="No space left"):
            call(run, tmp_path / target)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"x.gguf is there already.\n  Accepted: a file that does not exist"):
        call(run, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_what_is_missing_is_said_before_anything_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"package gguf, which is not installed.\n  Accepted: "):
        patch.setitem(sys.modules, "gguf", None)
        call(run, tmp_path / "x.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"0.0 MiB free, and the weights need 0.2 MiB.\n  Accepted: .*give another --to"):
        call(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("2kb", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert convert.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size.\n  Accepted: a number above 0"):
        convert.parse_size(text)


def test_the_command(run: Path, tmp_path: Path) -> None:
    def command(*given: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "jaxllm.convert", *given], cwd=ROOT, capture_output=True, text=True, check=False
        )

    done = command("--from", str(run), "--to", str(tmp_path / "hf"), "--step=10", "--check", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    assert "tiny, step 10" in done.stdout and "rounded to float16" in done.stdout
    done = command("--from", str(run))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --to is not given.\n  Accepted: --from SRC --to DST")


@pytest.mark.parametrize("wanted", [convert.HF, convert.RUN])
def test_adapters_are_folded_into_the_weights(wanted: str, tmp_path: Path) -> None:
    """Also where matrices were frozen in bfloat16, and where a pattern names the arrays of the adapters."""
    fields = {"train__transforms": ("lora",), "train__trainable": ".*/(a|b)", "precision__frozen": "bfloat16", "lora__rank": 2}
    source = write_run(tmp_path / "run", model__name="llama", model__layers=1, **fields)
    code, text = call(source, tmp_path / "there", wanted, "float32", checked=True)
    assert code == 0 and "lora merged into the weights: the largest change of a logit is" in text
    found, exact = runs.load(tmp_path / "there"), adapt.merged(runs.load(source).params)
    assert found.config.train.transforms == () and {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {"float32"}
    jax.tree.map(np.testing.assert_array_equal, found.params, exact)
