"""Continues prompts with a trained model.

  python -m jaxllm.generate --run DIR --prompt "..." [--prompt "..."] [--max_tokens N] [--temperature T] [--seed N]
  python -m jaxllm.generate --run DIR --prompt "..." --num_beams 4 [--length_penalty A]
  python -m jaxllm.generate --run DIR --chat [--system TEXT] [--prompt TEXT] [--adapter NAME=PATH ...]

A decoder continues the prompt; an encoder-decoder (t5, transformer) reads it and writes a text behind an arrow. Places to be filled by a
model of span corruption are written <extra_id_0>, <extra_id_1>, ... A single prompt is written as it is generated; several are
generated together, with an empty line between.

--chat talks with a model whose tokenizer has a chat template: every line that is typed, or that comes through a pipe, is a message, and
/help lists what else can be done. With --prompt one message is answered, and the program ends. With --adapter a base is answered with
adapters of PEFT, the first one until /adapter NAME says another; a text is continued with one by --run ADAPTER --base DIR.
"""

import io
import signal
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxllm import api, command, conversation, runs
from jaxllm.adapters import Adapters
from jaxllm.decode import beam, text
from jaxllm.decode.talk import Talk
from jaxllm.engine import compilation
from jaxllm.ops import sampling
from jaxllm.runs import Run

# What a flag is where it is not given: (continuing a text, with --chat).
DEFAULTS = {"max_tokens": (128, 512), "temperature": (0.8, 0.7), "top_p": (1.0, 0.95)}
# Flags that mean nothing with --chat, and instead of which there is something else.
NOT_IN_CHAT = ("prompts_file", "num_beams", "length_penalty", "early_stopping", "stream")


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained model; or a Hugging Face directory, a GGUF file, an adapter of PEFT")
    flags.DEFINE_string("base", "", "of an adapter: the model that it stands beside; default: the path that the adapter names")
    flags.DEFINE_multi_string(
        "adapter", [], "with --chat, NAME=PATH of an adapter of PEFT beside --run; several are switched between by /adapter NAME"
    )
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_bool("chat", False, "a conversation with a model that has a chat template, in the terminal or through a pipe")
    flags.DEFINE_string("system", "", "with --chat, the message of the system; default: what the template says, if anything")
    flags.DEFINE_multi_string(
        "prompt",
        [],
        "text to continue or to read, may be given several times; '' starts a new document. With --chat a message, which is"
        " answered before the program ends",
    )
    flags.DEFINE_string("prompts_file", "", "UTF-8 file with one prompt a line")
    flags.DEFINE_integer(
        "max_tokens", None, f"new tokens for each prompt; fewer at the end of a document or of the context{_default('max_tokens')}"
    )
    flags.DEFINE_float("temperature", None, f"0 is greedy, 1 is the model's own distribution{_default('temperature')}")
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0 means all")
    flags.DEFINE_float("top_p", None, f"draw from the likeliest tokens that hold this probability; 1 means all{_default('top_p')}")
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this likely, as a share of the likeliest; 0 means all")
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens that occurred before less likely")
    flags.DEFINE_integer("seed", 0, "the same seed gives the same text")
    flags.DEFINE_integer("num_beams", 1, "above 1 searches for the likeliest text with so many beams, instead of drawing tokens")
    flags.DEFINE_float("length_penalty", 1.0, "beams: scores are divided by length ** this; above 0 prefers long texts")
    flags.DEFINE_bool(
        "early_stopping", False, "beams: end with the first num_beams texts that ended; else when none can get better"
    )
    flags.DEFINE_enum(
        "cache",
        "",
        ["", "compute", "int8"],
        "keys and values that are kept: in the dtype of the computation, or in 8 bits; default: as trained",
    )
    flags.DEFINE_bool("stream", True, "write a single prompt's text as it is generated")


def _default(name: str) -> str:
    plain, chat = DEFAULTS[name]
    return f"; default: {plain}, with --chat {chat}"


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    prepare_stdout()
    check_chat()
    settings, adapters = read_settings(), read_adapters(given.adapter)
    prompts = given.prompt if given.chat else read_prompts(given.prompt, given.prompts_file)
    compilation.use_cache()
    run = runs.load(given.run, given.step, base=given.base, for_decoding=True, cache=given.cache)
    if given.chat and isinstance(settings, sampling.Settings):
        talk(run, settings, prompts, adapters)
    else:
        continue_texts(run, settings, prompts)


def talk(run: Run, settings: sampling.Settings, prompts: list[str], paths: dict[str, str]) -> None:
    """The answer to the prompt, if there is one, else a conversation. paths: of the adapters, by name; the first one is used."""
    options = {"system": flags.FLAGS.system, "max_tokens": chosen("max_tokens"), "seed": flags.FLAGS.seed}
    adapters = Adapters(run)
    for name, path in paths.items():
        adapters.add(name, path)
    used = next(iter(paths), None)
    first = adapters.use(used)
    talker = Talk(first.model, first.params, first.tokenizer, settings, **options)
    if prompts:
        conversation.show(talker.ask(prompts[0].strip()))
    else:
        conversation.converse(talker, conversation.typed_lines(), conversation.Choice(adapters, used) if paths else None)


def continue_texts(run: Run, settings: sampling.Settings | beam.Settings, prompts: list[str]) -> None:
    """Writes each prompt and what the model writes behind it."""
    given = flags.FLAGS
    if getattr(run.tokenizer, "template", None) is not None:
        conversation.tell("continues the text; this model has a chat template, and --chat talks with it")
    model = (run.model, run.params, run.tokenizer)
    options = {"max_new_tokens": chosen("max_tokens"), "seed": given.seed}
    if len(prompts) == 1 and given.stream and isinstance(settings, sampling.Settings):
        pieces = text.stream(*model, prompts[0], settings, **options)
        write(prompts[0] + text.join(run.model, ""), pieces)
        return
    for index, (prompt, written) in enumerate(zip(prompts, text.complete(*model, prompts, settings, **options), strict=True)):
        write("\n" * (index > 0) + prompt, [text.join(run.model, written)])


def chosen(name: str) -> Any:
    """The value of a flag of DEFAULTS."""
    value = flags.FLAGS[name].value
    return DEFAULTS[name][flags.FLAGS.chat] if value is None else value


def check_chat() -> None:
    """ValueError for flags that contradict --chat, or that mean something with it only."""
    given = flags.FLAGS
    if not given.chat:
        if given["system"].present:
            raise ValueError(
                "--system without --chat.\n  Accepted: a message of the system stands at the beginning of a conversation.\n"
                "  Add --chat, or write the text into --prompt."
            )
        if given.adapter:
            raise ValueError(
                "--adapter without --chat.\n  Accepted: a conversation goes from one adapter to another; a text is continued with one.\n"
                "  Add --chat, or give the path of the adapter as --run and the model beside it as --base."
            )
        return
    if unused := [f"--{name}" for name in NOT_IN_CHAT if given[name].present]:
        raise ValueError(
            f"{', '.join(unused)} with --chat.\n  Accepted: an answer is drawn and streamed; with temperature, top_k, top_p, min_p,"
            " repetition_penalty, max_tokens, seed, system and one prompt. Several messages come through a pipe, one a line.\n"
            f"  Leave out {' and '.join(unused)}."
        )
    if len(given.prompt) > 1 or not all(map(str.strip, given.prompt)):
        what = f"{len(given.prompt)} prompts" if len(given.prompt) > 1 else "an empty --prompt"
        raise ValueError(
            f"{what} with --chat.\n  Accepted: --prompt with one message; none, and messages are typed or come through a pipe, one a"
            " line.\n  Leave out --prompt, or give one message."
        )


def read_adapters(given: Sequence[str]) -> dict[str, str]:
    """Name -> path of texts NAME=PATH; ValueError for other texts, and a name that cannot be told from another."""
    found: dict[str, str] = {}
    for each in given:
        name, _, path = (part.strip() for part in each.partition("="))
        if not name or not path or name in (*found, conversation.NONE):
            what = "has a name that is taken" if path and name else "does not name an adapter and its path"
            raise ValueError(
                f"--adapter {each} {what}.\n  Accepted: NAME=PATH, as --adapter poet=runs/poet_peft, with a name of its own;"
                f" '{conversation.NONE}' is the base alone.\n  Correct it."
            )
        found[name] = path
    return found


def read_settings() -> sampling.Settings | beam.Settings:
    """How tokens are chosen; ValueError for flags that contradict each other."""
    given, beams = flags.FLAGS, flags.FLAGS.num_beams != 1
    others = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if beams else ("length_penalty", "early_stopping")
    if unused := [f"--{name}" for name in others if given[name].present]:
        raise ValueError(
            f"{', '.join(unused)} with --num_beams {given.num_beams}.\n"
            "  Accepted: either drawing tokens (temperature, top_k, top_p, min_p, repetition_penalty), or --num_beams above 1 with"
            " length_penalty and early_stopping.\n  Leave out one of them."
        )
    if beams:
        return beam.Settings(given.num_beams, given.length_penalty, given.early_stopping)
    return sampling.Settings(chosen("temperature"), given.top_k, chosen("top_p"), given.min_p, given.repetition_penalty)


def read_prompts(given: list[str], path: str) -> list[str]:
    """The prompts of the command line, then those of the file; ValueError if there are none."""
    prompts = given + _lines(path) if path else given
    if not prompts:
        raise ValueError(
            'no prompt is given.\n  Accepted: --prompt "text", once or several times, or --prompts_file with one a line.\n'
            '  Add --prompt; --prompt "" starts a new document.'
        )
    return prompts


def _lines(path: str) -> list[str]:
    try:
        # Not splitlines(), which also splits at form feeds and other characters inside a line.
        return [line for line in Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n") if line]
    except OSError as error:
        raise ValueError(
            f"--prompts_file '{path}' cannot be read: {error.strerror}.\n  Accepted: text, one prompt a line.\n  Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompts_file '{path}' is not UTF-8 ({error}).\n  Accepted: text in UTF-8, one prompt a line.\n  Convert the file."
        ) from error


def prepare_stdout() -> None:
    """What the terminal cannot show becomes "?"; a reader that goes away (`| head`) ends this program without a message."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def write(prompt: str, pieces: Iterable[str]) -> None:
    """Prints the prompt and then each piece at once."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


class _Callable(types.ModuleType):
    """This module under its other name: `jaxllm.generate(...)` is the function of the API, also after `import jaxllm.generate`,
    which puts the module in its place."""

    __call__ = staticmethod(api.generate)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    define_flags()
    command.run(main)
