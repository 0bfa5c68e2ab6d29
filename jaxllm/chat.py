"""Talks with a model that was tuned for conversations.

  python -m jaxllm.chat --run DIR_OR_GGUF [--system TEXT] [--prompt TEXT] [--temperature T] [--max_tokens N]

--run: a run, a Hugging Face directory or a GGUF file; its tokenizer must have a chat template. With --prompt one answer is written
and the program ends. Else every line that is typed is a message, and /reset, /exit and Ctrl-C do what they say.
"""

import contextlib
import sys
import types
from collections.abc import Iterable, Iterator

from absl import flags
from rich.console import Console

from jaxllm import api, command, runs
from jaxllm.data.chat import encoding
from jaxllm.data.documents import Message
from jaxllm.decode import chat
from jaxllm.engine import compilation
from jaxllm.generate import prepare_stdout, write
from jaxllm.ops import sampling
from jaxllm.runs import Run

YOU = "> "
HELP = "commands: /reset forgets the conversation, /exit (or Ctrl-D) ends; anything else is a message"


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory, Hugging Face directory or GGUF file of a model with a chat template")
    flags.DEFINE_integer("step", None, "checkpoint to use, of a run; default: the newest")
    flags.DEFINE_string("system", "", "message of the system at the beginning; default: what the template puts there, if anything")
    flags.DEFINE_string("prompt", "", "a single message: its answer is written, and the program ends")
    flags.DEFINE_integer("max_tokens", 512, "tokens of an answer at most")
    flags.DEFINE_float("temperature", 0.7, "0 is greedy, 1 is the model's own distribution")
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0 means all")
    flags.DEFINE_float("top_p", 0.95, "draw from the likeliest tokens that hold this probability; 1 means all")
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this likely, as a share of the likeliest; 0 means all")
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens that occurred before less likely")
    flags.DEFINE_integer("seed", 0, "the same seed gives the same answers")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    prepare_stdout()
    settings = sampling.Settings(given.temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty)
    compilation.use_cache()
    run = runs.load(given.run, given.step, for_decoding=True)
    talk = Talk(run, settings, system=given.system, max_tokens=given.max_tokens, seed=given.seed)
    if given.prompt:
        write("", talk.answer(given.prompt))
    else:
        converse(talk, _lines())


class Talk:
    """A conversation with a model. messages: all of it so far; what no longer fits the context is left out of what the model reads."""

    def __init__(self, run: Run, settings: sampling.Settings, *, system: str, max_tokens: int, seed: int) -> None:
        self.run, self.settings, self.max_tokens, self.seed = run, settings, max_tokens, seed
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.system)
        encoding.require(run.tokenizer)
        if system:
            encoding.check(run.tokenizer, self.system)

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = list(self.system)

    def answer(self, content: str) -> Iterator[str]:
        """Pieces of the answer to a message of the user; both join the conversation, also if the reader stops early.

        ValueError at once, and an unchanged conversation, for a message that cannot be sent.
        """
        model, tokenizer = self.run.model, self.run.tokenizer
        asked = [*self.messages, {"role": "user", "content": content}]
        prompt = chat.fit(tokenizer, asked, model.config.context_tokens, self.max_tokens)
        if prompt.dropped:
            _tell(f"the oldest {prompt.dropped} messages are left out: the context of {model.config.context_tokens} tokens is full")
        options = {"max_new_tokens": self.max_tokens, "seed": self.seed}
        pieces = chat.stream(model, self.run.params, tokenizer, prompt.ids, self.settings, **options)
        return self._keep(asked, pieces)

    def _keep(self, asked: list[Message], pieces: Iterable[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said.rstrip()}]


def converse(talk: Talk, lines: Iterable[str]) -> None:
    """Answers line after line. A message that cannot be sent is explained, and the conversation goes on."""
    try:
        for line in lines:
            message = line.strip()
            if message == "/exit":
                return
            if message == "/reset":
                talk.reset()
                _tell("the conversation begins anew")
            elif message.startswith("/"):
                _tell(HELP)
            elif message:
                _answer(talk, message)
    except KeyboardInterrupt:
        print()


def _answer(talk: Talk, message: str) -> None:
    try:
        pieces = talk.answer(message)
    except ValueError as error:
        if "\n  " not in str(error):
            raise
        _tell(str(error))
        return
    write("", pieces)


def _lines() -> Iterator[str]:
    """What is typed, or what comes through a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - lets the arrow keys edit the line
    _tell(HELP)
    while True:
        try:
            yield input(YOU)
        except EOFError:
            print()
            return


def _tell(text: str) -> None:
    """A line that is not part of the conversation."""
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


class _Callable(types.ModuleType):
    """This module under its other name: `jaxllm.chat(...)` is the function of the API, also after `import jaxllm.chat`."""

    __call__ = staticmethod(api.chat)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    define_flags()
    command.run(main)
