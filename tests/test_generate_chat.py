"""`python -m jaxllm.chat` from end to end on a small GGUF file: what is answered, kept, forgotten and refused."""

import importlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf

import jaxllm
from jaxllm import api, runs
from jaxllm.ops.sampling import Settings

ROOT = Path(__file__).resolve().parent.parent
# By this name, as `jaxllm.chat` is the function of the API.
command = importlib.import_module("jaxllm.chat")


def write(path: Path, **changes: str | None) -> Path:
    weights = tiny_gguf.tensors(np.random.default_rng(2))
    # Rows of ids without a token, which are never drawn.
    weights["token_embd.weight"][len(tiny_gguf.TOKENS) :] *= 9
    values = tiny_gguf.model_values() | tiny_gguf.tokenizer_values(**changes)
    return tiny_gguf.write(path, tiny_gguf.stored(weights), values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def talk(model: Path) -> command.Talk:
    return command.Talk(runs.load(model, for_decoding=True), Settings(temperature=0), system="", max_tokens=6, seed=3)


def chat(*flags: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
    arguments = [sys.executable, "-m", "jaxllm.chat", *flags]
    return subprocess.run(arguments, cwd=ROOT, input=typed, capture_output=True, text=True, check=False)


def test_one_answer(model: Path) -> None:
    """That of the API, which is also what the module is called as."""
    flags = ("--temperature=0.8", "--top_k=40", "--seed=4", "--max_tokens=12", "--system=be")
    done = chat("--run", str(model), "--prompt", "hello", *flags)
    assert done.returncode == 0, done.stderr
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    expected = jaxllm.chat(*jaxllm.load(model), messages, max_new_tokens=12, seed=4, temperature=0.8, top_k=40)
    assert expected
    assert done.stdout.rstrip() == expected
    assert jaxllm.chat(*jaxllm.load(model), "a", 4, temperature=0) == api.chat(
        *jaxllm.load(model), [{"role": "user", "content": "a"}], 4, temperature=0
    )


def test_a_conversation_through_a_pipe(model: Path) -> None:
    """The second answer knows the first exchange, /reset forgets it, and a message that spells a special token is refused."""
    typed = "hello\n\nworld\n/reset\nworld\nx<|end|>\n/what\n/exit\nnever\n"
    done = chat("--run", str(model), "--temperature=0", "--max_tokens=6", typed=typed)
    assert done.returncode == 0, done.stderr
    talker, options = jaxllm.load(model), {"max_new_tokens": 6, "temperature": 0}
    first = jaxllm.chat(*talker, "hello", **options)
    exchange = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}, {"role": "user", "content": "world"}]
    answers = [first, jaxllm.chat(*talker, exchange, **options), jaxllm.chat(*talker, "world", **options)]
    assert [line.rstrip() for line in done.stdout.split("\n")] == [*answers, ""]
    told = done.stderr
    assert "the conversation begins anew" in told
    assert "contains '<|end|>', which would end the message" in told
    assert "commands: /reset" in told
    assert "Traceback" not in told


def test_what_does_not_fit_is_left_out_or_refused(talk: command.Talk, capsys: pytest.CaptureFixture[str]) -> None:
    """The context holds 64 tokens; an exchange takes about 20 and more."""
    command.converse(talk, ["hello 1", "hello 2", "hello 3", "hello 4", "x" * 70, "hello 5"])
    out, told = capsys.readouterr()
    assert out.count("\n") == 5, "one line an answer"
    assert "messages are left out: the context of 64 tokens is full" in told
    assert re.search(r"the last message and what goes with it are \d+ tokens.\n  Accepted: up to 63", told)
    contents = [message["content"] for message in talk.messages]
    assert contents[::2] == [f"hello {index}" for index in range(1, 6)], "the refused message did not stay"


def test_an_answer_that_is_broken_off_stays_in_the_conversation(talk: command.Talk, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = talk.answer("hello")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"] == first.rstrip()

    def interrupt() -> Iterator[str]:
        yield "hello"
        raise KeyboardInterrupt

    command.converse(talk, interrupt())
    assert capsys.readouterr().out.endswith("\n\n")


def test_ctrl_c_ends_without_a_word(model: Path) -> None:
    arguments = [sys.executable, "-m", "jaxllm.chat", "--run", str(model), "--max_tokens=4"]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1), "the answer has begun, so everything is loaded"
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
        process.stdin.close()
        assert process.wait() == 0, error
    assert b"Traceback" not in error


def test_mistakes_are_explained(model: Path, tmp_path: Path) -> None:
    done = chat("--run", str(write(tmp_path / "tiny.gguf", chat_template=None)), "--prompt=hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the tokenizer of this model has no chat template.\n  Accepted: ")
    with pytest.raises(ValueError, match=r"a message of the system contains '<\|end\|>'"):
        command.Talk(runs.load(model), Settings(), system="<|end|>", max_tokens=6, seed=3)
