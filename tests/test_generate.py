"""`python -m jaxllm.generate` from end to end: the text of the API on standard output, and mistakes explained."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_run import write_run

import jaxllm
from jaxllm import api
from jaxllm.generate import read_prompts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def generate(*flags: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-m", "jaxllm.generate", *flags], cwd=ROOT, capture_output=True, check=False)


@pytest.mark.parametrize("stream", [("--stream",), ("--nostream",)])
def test_one_prompt(run: Path, stream: tuple[str, ...]) -> None:
    """Of the first checkpoint, with every setting away from its default."""
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    done = generate("--run", str(run), "--step=10", "--prompt", "The é", "--max_tokens=12", *flags, *stream)
    assert done.returncode == 0, done.stderr.decode()
    expected = api.generate(*jaxllm.load(run, 10), "The é", max_new_tokens=12, **settings)
    assert done.stdout.decode() == f"The é{expected}\n"


def test_several_prompts_and_a_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("fox\n\ndog\n", encoding="utf-8")
    flags = ("--temperature=0", "--max_tokens=8")
    done = generate("--run", str(run), "--prompt", "", "--prompt=a", "--prompts_file", str(tmp_path / "prompts.txt"), *flags)
    assert done.returncode == 0, done.stderr.decode()
    prompts = ["", "a", "fox", "dog"]
    texts = api.generate(*jaxllm.load(run), prompts, max_new_tokens=8, temperature=0)
    assert done.stdout.decode() == "\n".join(f"{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True))


def test_an_encoder_decoder_writes_behind_an_arrow_also_by_beams(tmp_path: Path) -> None:
    """The prompt has a sentinel, which is one token."""
    fields = {"model__name": "t5", "model__kv_heads": 0, "model__layers": 1, "train__objective": "span_corruption"}
    directory = write_run(tmp_path / "t5", **fields)
    model, prompt = jaxllm.load(directory), "The <extra_id_0> fox"
    done = generate("--run", str(directory), "--prompt", prompt, "--max_tokens=8", "--num_beams=3", "--length_penalty=0.5")
    assert done.returncode == 0, done.stderr.decode()
    expected = api.generate(*model, prompt, 8, num_beams=3, length_penalty=0.5)
    assert done.stdout.decode() == f"{prompt} -> {expected}\n"
    done = generate("--run", str(directory), "--prompt", prompt, "--max_tokens=8", "--temperature=0")
    assert done.stdout.decode() == f"{prompt} -> {api.generate(*model, prompt, 8, temperature=0)}\n"


def test_drawing_and_searching_exclude_each_other(run: Path) -> None:
    done = generate("--run", str(run), "--prompt=a", "--num_beams=2", "--temperature=0.5")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: --temperature with --num_beams 2.\n  Accepted: either drawing tokens")
    done = generate("--run", str(run), "--prompt=a", "--length_penalty=2")
    assert done.stderr.decode().startswith("error: --length_penalty with --num_beams 1.\n  Accepted")


def test_a_poor_terminal_and_a_reader_that_leaves(run: Path) -> None:
    """What ASCII lacks becomes "?"; `| head` ends the program as it ends any other: by the signal, without a word."""
    command = [sys.executable, "-m", "jaxllm.generate", "--run", str(run), "--prompt", "é", "--max_tokens=4"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout[:1]) == (0, b"?"), done.stderr.decode()
    left = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert left.stdout is not None and left.stderr is not None
    left.stdout.close()
    error = left.stderr.read()
    left.stderr.close()
    assert (left.wait(), error) == (-signal.SIGPIPE, b"")


def test_a_mistake_is_explained_without_a_traceback(run: Path) -> None:
    done = generate("--run", str(run.parent / "tinny"), "--prompt", "a")
    assert done.returncode == 2
    assert done.stdout == b""
    error = done.stderr.decode()
    assert error.startswith(f"error: no run in '{run.parent / 'tinny'}': it does not exist. Did you mean '{run}'?\n  Accepted:")
    assert "Traceback" not in error


def test_prompts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prompt is given.\n  Accepted: --prompt"):
        read_prompts([], "")
    (tmp_path / "lines.txt").write_text("\ufeffone\fpage\n\ntwo\u2028lines\r\n", encoding="utf-8", newline="")
    assert read_prompts(["a"], str(tmp_path / "lines.txt")) == ["a", "one\fpage", "two\u2028lines"]
    (tmp_path / "latin1.txt").write_bytes("Köln".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1.txt' is not UTF-8[\s\S]*Accepted: text in UTF-8"):
        read_prompts(["a"], str(tmp_path / "latin1.txt"))
