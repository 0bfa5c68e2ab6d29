"""Continues prompts with a trained model.

  python -m jaxllm.generate --run DIR --prompt "..." [--prompt "..."] [--max_tokens N] [--temperature T] [--seed N]
  python -m jaxllm.generate --run DIR --prompt "..." --num_beams 4 [--length_penalty A]

A decoder continues the prompt; an encoder-decoder (t5, transformer) reads it and writes a text behind an arrow. Places to be filled by a
model of span corruption are written <extra_id_0>, <extra_id_1>, ... A single prompt is written as it is generated; several are
generated together, with an empty line between.
"""

import io
import signal
import sys
import types
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from jaxllm import api, command, runs
from jaxllm.decode import beam, text
from jaxllm.engine import compilation
from jaxllm.ops import sampling


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained model; or a Hugging Face directory, a GGUF file, an adapter of PEFT")
    flags.DEFINE_string("base", "", "of an adapter: the model that it stands beside; default: the path that the adapter names")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_multi_string("prompt", [], "text to continue or to read, may be given several times; '' starts a new document")
    flags.DEFINE_string("prompts_file", "", "UTF-8 file with one prompt a line")
    flags.DEFINE_integer("max_tokens", 128, "new tokens for each prompt; fewer at the end of a document or of the context")
    flags.DEFINE_float("temperature", 0.8, "0 is greedy, 1 is the model's own distribution")
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0 means all")
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that hold this probability; 1 means all")
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this likely, as a share of the likeliest; 0 means all")
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens that occurred before less likely")
    flags.DEFINE_integer("seed", 0, "the same seed gives the same text")
    flags.DEFINE_integer("num_beams", 1, "above 1 searches for the likeliest text with so many beams, instead of drawing tokens")
    flags.DEFINE_float("length_penalty", 1.0, "beams: scores are divided by length ** this; above 0 prefers long texts")
    flags.DEFINE_bool(
        "early_stopping", False, "beams: end with the first num_beams texts that ended; else when none can get better"
    )
    flags.DEFINE_bool("stream", True, "write a single prompt's text as it is generated")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    prepare_stdout()
    settings = read_settings()
    prompts = read_prompts(given.prompt, given.prompts_file)
    compilation.use_cache()
    run = runs.load(given.run, given.step, base=given.base, for_decoding=True)
    model = (run.model, run.params, run.tokenizer)
    options = {"max_new_tokens": given.max_tokens, "seed": given.seed}
    if len(prompts) == 1 and given.stream and isinstance(settings, sampling.Settings):
        pieces = text.stream(*model, prompts[0], settings, **options)
        write(prompts[0] + text.join(run.model, ""), pieces)
        return
    for index, (prompt, written) in enumerate(zip(prompts, text.complete(*model, prompts, settings, **options), strict=True)):
        write("\n" * (index > 0) + prompt, [text.join(run.model, written)])


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
    return sampling.Settings(given.temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty)


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
