"""A conversation in the terminal, or through a pipe: what is typed is a message or a command, and answers are written as they come."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jaxllm.adapters import Adapters
from jaxllm.decode.talk import Answer, Talk

YOU, MORE = "> ", ". "
GOES_ON = "\\"
# In the place of an adapter's name: the base alone.
NONE = "none"
HELP = """\
  /undo         takes the last message and its answer back
  /retry        answers the last message again, with another seed
  /system TEXT  sets the message of the system; without TEXT it is taken away
  /reset        forgets all but the message of the system
  /adapter NAME answers with this one of --adapter from now on, or with "none"; without NAME lists them
  /save FILE    adds the conversation to FILE, as one line of JSON
  /exit         ends, as Ctrl-D does
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer. A message that begins with / is typed with a space before it."""


@dataclass
class Choice:
    """The adapters that a conversation can be answered with, and the one in use; None is the base alone."""

    adapters: Adapters
    used: str | None


def converse(talk: Talk, lines: Iterable[str], choice: Choice | None = None) -> None:
    """Answers message after message until /exit, the end of the lines or Ctrl-C while one is awaited.

    What cannot be done is explained, and the conversation goes on.
    """
    try:
        for message in join(lines):
            if message.startswith("/") and message.split()[0] == "/exit":
                return
            if message.strip():
                _attempt(talk, message, choice)
    except KeyboardInterrupt:
        print()
        if not sys.stdin.isatty():
            raise


def join(lines: Iterable[str]) -> Iterator[str]:
    """Messages: lines that end in a backslash and what follows them are one, with line breaks in the place of the backslashes."""
    begun: list[str] = []
    for line in lines:
        text = line.rstrip("\r\n")
        begun.append(text.removesuffix(GOES_ON))
        if not text.endswith(GOES_ON):
            yield "\n".join(begun)
            begun = []
    if begun:
        yield "\n".join(begun)


def _attempt(talk: Talk, message: str, choice: Choice | None) -> None:
    """Does what a message or a command asks for. An error that says what to change is told instead; so is Ctrl-C at a terminal."""
    try:
        if message.startswith("/"):
            _obey(talk, message, choice)
        else:
            show(talk.ask(message.strip()))
    except ValueError as error:
        if "\n  " not in str(error):
            raise
        tell(str(error))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print()
        tell("stopped: /retry answers again, /undo takes the message back")


def _obey(talk: Talk, typed: str, choice: Choice | None) -> None:
    name, *rest = typed.split(None, 1)
    text = "".join(rest).strip()
    commands: dict[str, Callable[[], None]] = {
        "/undo": lambda: tell(f"taken back: {talk.undo()}"),
        "/retry": lambda: _retry(talk),
        "/system": lambda: _set_system(talk, text),
        "/reset": lambda: _reset(talk),
        "/adapter": lambda: tell(switch(talk, choice, text)),
        "/save": lambda: tell(save(talk, text)),
        "/help": lambda: tell(HELP),
    }
    if name in commands:
        commands[name]()
    else:
        tell(f"there is no command {name}. There are\n{HELP}")


def _retry(talk: Talk) -> None:
    if talk.greedy:
        tell("a temperature of 0 draws nothing, so this is the same answer")
    show(talk.retry())


def _set_system(talk: Talk, content: str) -> None:
    talk.set_system(content)
    tell("the message of the system is set" if content else "there is no message of the system")


def _reset(talk: Talk) -> None:
    talk.reset()
    tell("the conversation begins anew")


def switch(talk: Talk, choice: Choice | None, name: str) -> str:
    """Has the conversation answered with this adapter from now on, and says so; without a name, which ones there are.

    ValueError for a conversation without adapters, and for one that is not there.
    """
    if choice is None:
        raise ValueError(
            "/adapter in a conversation without adapters.\n  Accepted: with those that the program was given.\n"
            "  Begin again with --adapter NAME=PATH, once for each."
        )
    names = (*choice.adapters.names(), NONE)
    if not name:
        used = choice.used or NONE
        return "\n".join(f"{'*' if each == used else ' '} {each}" for each in names)
    if name not in names:
        raise ValueError(f"there is no adapter '{name}'.\n  Accepted: {', '.join(names)}.\n  Correct the name.")
    wanted = None if name == NONE else name
    run = choice.adapters.use(wanted)
    talk.use(run.model, run.params, run.tokenizer)
    choice.used = wanted
    return f"answers with the adapter {name} from now on" if choice.used else "answers with the base alone from now on"


def save(talk: Talk, path: str) -> str:
    """Adds the conversation to the end of the file, as a line of instruction data: what was done, in words.

    ValueError without a path, without a message, and for a file that cannot be written.
    """
    if not path:
        raise ValueError("/save without a file.\n  Accepted: /save FILE, which is made if it is not there.\n  Name a file.")
    if not talk.messages:
        raise ValueError("nothing has been said yet.\n  Accepted: a conversation with an answer.\n  Write a message first.")
    line = json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n"
    try:
        with Path(path).expanduser().open("a+b") as file:
            file.seek(0)
            before = file.read()
            file.write(b"\n" * (bool(before) and not before.endswith(b"\n")) + line.encode())
    except OSError as error:
        raise ValueError(
            f"'{path}': {error.strerror}.\n  Accepted: a path that this user can write to.\n  Name another file, or correct the path."
        ) from error
    return f"{'added to' if before else 'saved in'} {path}: {len(talk.messages)} messages"


def show(answer: Answer) -> None:
    """Writes the answer as it comes, and says what is odd about it."""
    if answer.dropped:
        tell(f"the oldest {answer.dropped} messages are left out, as the context is full")
    said = False
    with contextlib.closing(answer.pieces) as pieces:
        for piece in pieces:
            said = True
            print(piece, end="", flush=True)
    print(flush=True)
    if not said:
        tell("the answer is empty; another seed may give one")


def typed_lines() -> Iterator[str]:
    """What is typed, behind marks, or what comes through a pipe."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - lets the arrow keys edit the line
    tell("a conversation; /help lists the commands, Ctrl-D ends")
    mark = YOU
    while True:
        try:
            line = input(mark if sys.stdout.isatty() else "")
        except EOFError:
            print()
            return
        mark = MORE if line.endswith(GOES_ON) else YOU
        yield line


def tell(text: str) -> None:
    """Lines that are not part of what a model says: on stderr, also where that is no terminal."""
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
