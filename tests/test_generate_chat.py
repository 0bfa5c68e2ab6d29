"""`python -m jaxllm.generate --chat` from end to end on a small GGUF file: what is answered, kept, forgotten, stopped and refused."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_gguf

import jaxllm
from jaxllm import api, conversation, models, runs
from jaxllm.data import tokenize
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.decode.talk import Answer, Talk
from jaxllm.interop import directory, peft, peft_params
from jaxllm.ops.sampling import Settings
from jaxllm.transforms import adapt, tree

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "jaxllm.generate", "--chat"]


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
def talk(model: Path) -> Talk:
    run = runs.load(model, for_decoding=True)
    return Talk(run.model, run.params, run.tokenizer, Settings(temperature=0), system="", max_tokens=6, seed=3)


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, Path]:
    """Two adapters of the model, with which it says other things; beside the second one a tokenizer with another template."""
    run = runs.load(model)
    config = run.config.copy_and_resolve_references()
    config.train.transforms = ("lora",)
    config.lora.update({"rank": 2, "alpha": 4.0, "targets": ".*(k|v|down)/kernel"})
    adapted = models.build(config)
    begun = adapt.Adaptation(run.model.axes, adapted.config.transforms).params(run.params, jax.random.key(0))
    moved, rng = adapt.adapters(adapted.axes), np.random.default_rng(0)

    def move(path: Any, array: jax.Array) -> jax.Array:
        return array + rng.normal(0, 0.5, array.shape).astype("float32") if tree.path_name(path) in moved else array

    found = {name: model.parent / name for name in ("poet", "clerk")}
    for path in found.values():
        params = jax.tree.map_with_path(move, begun)
        peft.write(path, peft_params.export(params, adapted.config, base=str(model)))
    template = ChatTemplate(tiny_gguf.TEMPLATE.replace("assistant", "clerk"), {})
    for name, data in directory.tokenizer_alone(tokenize.extend(run.tokenizer, (), template), run.model.config).files.items():
        (found["clerk"] / name).write_bytes(data)
    return found


def chat(*flags: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *flags], cwd=ROOT, input=typed, capture_output=True, text=True, check=False)


def test_one_answer(model: Path) -> None:
    """That of the API, with the defaults that it has for conversations."""
    done = chat("--run", str(model), "--prompt", "hello", "--seed=4", "--system=be", "--max_tokens=12")
    assert done.returncode == 0, done.stderr
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    expected = jaxllm.chat(*jaxllm.load(model), messages, max_new_tokens=12, seed=4)
    assert expected
    assert done.stdout.rstrip() == expected
    assert jaxllm.chat(*jaxllm.load(model), "a", 4, temperature=0) == api.chat(
        *jaxllm.load(model), [{"role": "user", "content": "a"}], 4, temperature=0
    )


def test_a_conversation_through_a_pipe(model: Path, tmp_path: Path) -> None:
    """The second answer knows the first exchange, /reset forgets it, and what cannot be done is told beside the answers."""
    saved = tmp_path / "saved.jsonl"
    typed = f"hello\n\nworld\n/reset\nworld \\\n12\nx<|end|>\n/what\n/save {saved}\n/undo\n/undo\n/exit\nnever\n"
    done = chat("--run", str(model), "--temperature=0", "--max_tokens=6", typed=typed)
    assert done.returncode == 0, done.stderr
    talker, options = jaxllm.load(model), {"max_new_tokens": 6, "temperature": 0}
    first = jaxllm.chat(*talker, "hello", **options)
    exchange = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}, {"role": "user", "content": "world"}]
    last = jaxllm.chat(*talker, "world \n12", **options)
    answers = [first, jaxllm.chat(*talker, exchange, **options), last]
    assert [line.rstrip() for line in done.stdout.split("\n")] == [*answers, ""]
    messages = [{"role": "user", "content": "world \n12"}, {"role": "assistant", "content": last}]
    assert [json.loads(line) for line in saved.read_text("utf-8").split("\n")[:-1]] == [{"messages": messages}]
    told = done.stderr
    assert "the conversation begins anew" in told and f"saved in {saved}: 2 messages" in told
    assert "contains '<|end|>', which would end the message" in told
    assert "there is no command /what. There are\n  /undo" in told
    assert "taken back: world \n12\nnothing has been asked yet." in told
    assert "Traceback" not in told


def test_a_conversation_with_one_adapter_after_another(model: Path, adapters: dict[str, Path]) -> None:
    """Each answers as when it is opened by itself, to all that was said before; the base does, too."""
    flags = [f"--adapter={name}={path}" for name, path in adapters.items()]
    typed = "hello\n/adapter clerk\n/adapter\n/retry\nworld\n/adapter none\n/retry\n/adapter\n/adapter nobody\n"
    typed += "/adapter poet\n/reset\nhello\n"
    done = chat("--run", str(model), *flags, "--temperature=0", "--max_tokens=5", typed=typed)
    assert done.returncode == 0, done.stderr
    base, poet, clerk = (jaxllm.load(path) for path in (model, *adapters.values()))
    options = {"max_new_tokens": 5, "temperature": 0}
    poets, clerks = (jaxllm.chat(*talker, "hello", **options) for talker in (poet, clerk))
    exchange = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": clerks},
        {"role": "user", "content": "world"},
    ]
    answers = [poets, clerks, *(jaxllm.chat(*talker, exchange, **options) for talker in (clerk, base)), poets]
    assert [line.rstrip() for line in done.stdout.split("\n")] == [*answers, ""]
    assert len(set(answers)) == 4
    for words in (
        "answers with the adapter clerk from now on\n",
        "answers with the base alone from now on\n",
        "\n  poet\n* clerk\n  none\n",
        "\n  poet\n  clerk\n* none\n",
        "there is no adapter 'nobody'.\n  Accepted: poet, clerk, none.\n  Correct the name.",
    ):
        assert words in done.stderr


def test_an_adapter_drops_what_another_has_read(talk: Talk, model: Path, adapters: dict[str, Path]) -> None:
    """In a conversation that goes on: the keys and values of the exchange before are its own."""
    run = runs.load(model, for_decoding=True)
    several = conversation.Adapters(run)
    several.add("clerk", adapters["clerk"])
    conversation.converse(talk, ["hello", "/adapter clerk", "world"], conversation.Choice(several, None))
    expected = jaxllm.chat(*jaxllm.load(adapters["clerk"]), talk.messages[:-1], 6, temperature=0)
    assert talk.messages[-1]["content"] == expected


def test_lines_that_go_on() -> None:
    lines = ["one\n", "two \\\r\n", " three\\\n", "\n", "/system a\\\n", "b\n", "never ended\\"]
    assert list(conversation.join(lines)) == ["one", "two \n three\n", "/system a\nb", "never ended"]


def test_an_error_that_explains_nothing_is_a_fault_of_the_program(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(content: str) -> Answer:
        raise ValueError(content)

    monkeypatch.setattr(talk, "ask", ask)
    conversation.converse(talk, ["told.\\", "  Accepted: more."])
    with pytest.raises(ValueError, match=r"^not told$"):
        conversation.converse(talk, ["not told", "never"])


@pytest.mark.parametrize("typed", ["/exit", "/exit \t", "/exit now"])
def test_the_end_is_a_command_like_the_others(talk: Talk, typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A space before it makes it a message."""
    conversation.converse(talk, [" /exit", "/exiting", typed, "never"])
    assert [message["content"] for message in talk.messages[::2]] == ["/exit"]
    assert capsys.readouterr().err.count("there is no command") == 1


def test_what_does_not_fit_is_left_out_or_refused(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    """The context holds 64 tokens; an exchange takes about 20 and more."""
    conversation.converse(talk, ["hello 1", "hello 2", "hello 3", "hello 4", "x" * 70, " /hello 5"])
    out, told = capsys.readouterr()
    assert out.count("\n") == 5, "one line an answer"
    assert "messages are left out, as the context is full" in told
    assert re.search(r"the last message and what goes with it are \d+ tokens.\n  Accepted: up to 63", told)
    contents = [message["content"] for message in talk.messages]
    assert contents[::2] == ["hello 1", "hello 2", "hello 3", "hello 4", "/hello 5"], "the refused message did not stay"


def test_commands_change_the_conversation(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is added to, also one that does not end with its line; an answer without a word is said."""
    (tmp_path / "saved.jsonl").write_text("{}", encoding="utf-8")
    file = f"/save {tmp_path / 'saved.jsonl'}"
    conversation.converse(
        talk, [file, "/save", "/system é  du", file, "/retry", "hello", "/retry", f"/save {tmp_path}", "/system", "/adapter", file]
    )
    first, second, third = (tmp_path / "saved.jsonl").read_text("utf-8").splitlines()
    assert (first, second) == ("{}", '{"messages": [{"role": "system", "content": "é  du"}]}')
    assert json.loads(third)["messages"] == talk.messages
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    out, told = capsys.readouterr()
    assert out == 2 * out[: len(out) // 2], "greedy, so the same answer twice"
    for words in (
        "nothing has been said yet.",
        f"added to {tmp_path / 'saved.jsonl'}: 1 messages",
        "/save without a file.\n  Accepted: /save FILE",
        "the message of the system is set",
        "nothing has been asked yet.",
        "a temperature of 0 draws nothing",
        f"'{tmp_path}': Is a directory.\n  Accepted: a path that this user can write to",
        "there is no message of the system",
        "/adapter in a conversation without adapters.\n  Accepted: with those that the program was given.\n  Begin again with",
    ):
        assert words in told
    silent: Generator[str] = (piece for piece in ())
    conversation.show(Answer(silent, 0))
    assert "the answer is empty" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_stops_an_answer_of_which_stays_what_was_said(
    talk: Talk, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a terminal the conversation goes on, until Ctrl-C while a message is awaited. Through a pipe nobody is there to go on."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    ask = talk.ask

    def interrupted(content: str) -> Answer:
        answer = ask(content)

        def pieces() -> Generator[str]:
            with contextlib.closing(answer.pieces):
                yield next(answer.pieces)
                signal.raise_signal(signal.SIGINT)

        return Answer(pieces(), 0)

    def lines() -> Iterator[str]:
        monkeypatch.setattr(talk, "ask", interrupted)
        yield "hello"
        monkeypatch.setattr(talk, "ask", ask)
        yield "world"
        signal.raise_signal(signal.SIGINT)
        yield "never"

    if terminal:
        conversation.converse(talk, lines())
    else:
        with pytest.raises(KeyboardInterrupt):
            conversation.converse(talk, lines())
    out, told = capsys.readouterr()
    assert ("stopped: /retry answers again, /undo takes the message back" in told) == terminal
    contents = [message["content"] for message in talk.messages]
    assert contents[::2] == (["hello", "world"] if terminal else ["hello"])
    assert contents[1] and out.startswith(contents[1] + "\n" if terminal else contents[1])


def test_at_a_terminal_marks_ask_for_messages_and_ctrl_d_ends(model: Path) -> None:
    ours, theirs = os.openpty()

    def read_until(mark: bytes) -> bytes:
        out = b""
        while not out.endswith(mark):
            out += os.read(ours, 1)
        return out

    flags = ["--run", str(model), "--temperature=0", "--max_tokens=6"]
    with subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        read_until(b"> ")
        os.write(ours, b"hello \\\n")
        read_until(b". ")
        os.write(ours, b"world\n")
        shown = read_until(b"> ").decode(errors="replace").replace("\r", "")
        os.write(ours, b"\x04")
        told = process.stderr.read()
        assert process.wait() == 0, told
    os.close(ours)
    os.close(theirs)
    assert b"a conversation; /help lists the commands" in told and b"Traceback" not in told
    assert jaxllm.chat(*jaxllm.load(model), "hello \nworld", 6, temperature=0) in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_beams=2", "--stream"), "--num_beams, --stream with --chat.\n  Accepted: an answer is drawn"),
        (("--prompt=a", "--prompt=b"), "2 prompts with --chat.\n  Accepted: --prompt with one message"),
        (
            ("--nochat", "--adapter=a=b", "--prompt=b"),
            "--adapter without --chat.\n  Accepted: a conversation goes from one adapter",
        ),
        (("--adapter=poet",), "--adapter poet does not name an adapter and its path.\n  Accepted: NAME=PATH"),
        (("--adapter=a=b", "--adapter=a=c"), "--adapter a=c has a name that is taken.\n  Accepted: NAME=PATH"),
        (("--adapter=none=b",), "--adapter none=b has a name that is taken.\n  Accepted: NAME=PATH"),
        (("--nochat", "--system=a", "--prompt=b"), "--system without --chat.\n  Accepted: a message of the system stands"),
    ],
)
def test_flags_that_contradict_each_other(flags: tuple[str, ...], words: str) -> None:
    done = chat("--run=none", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {words}")


def test_a_text_is_continued_with_a_word_on_conversations(model: Path, tmp_path: Path) -> None:
    """Beside what is written, once, and only for a model that has a template."""
    bare = write(tmp_path / "tiny.gguf", chat_template=None)
    done = {
        path: chat("--nochat", f"--run={path}", "--prompt=a", "--prompt=b", "--temperature=0", "--max_tokens=8")
        for path in (model, bare)
    }
    assert [each.returncode for each in done.values()] == [0, 0] and done[model].stdout == done[bare].stdout != ""
    assert done[model].stderr == "continues the text; this model has a chat template, and --chat talks with it\n"
    assert done[bare].stderr == ""


def test_a_model_without_a_template_is_named(tmp_path: Path) -> None:
    done = chat("--run", str(write(tmp_path / "tiny.gguf", chat_template=None)), "--prompt=hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the tokenizer of this model has no chat template.\n  Accepted: ")
    assert "Use python -m jaxllm.generate without --chat" in done.stderr
