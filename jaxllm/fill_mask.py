"""Says what a model that was trained on masked text (bert) puts in the place of each mask.

  python -m jaxllm.fill_mask --run DIR --text "The [MASK] sat on the mat." [--text "..."] [--top_k 5]

A mask may be written [MASK], <mask>, or as the model's own tokenizer spells it. Every mask is filled with the others in place.
"""

import sys
import types
from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxllm import api, command, runs
from jaxllm.decode import masks
from jaxllm.decode.masks import Guess
from jaxllm.engine import compilation


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained model, or a directory of weights")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_multi_string("text", [], "text with [MASK] in it, may be given several times")
    flags.DEFINE_integer("top_k", 5, "likeliest tokens shown for each mask")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    if not given.text:
        raise ValueError(
            'no text is given.\n  Accepted: --text "The [MASK] sat on the mat.", once or several times.\n  Add --text.'
        )
    compilation.use_cache()
    run = runs.load(given.run, given.step, for_decoding=True)
    console = Console(soft_wrap=True)
    for text, found in zip(given.text, masks.fill(run.model, run.params, run.tokenizer, given.text, given.top_k), strict=True):
        show(text, found, console)


def show(text: str, found: Sequence[Sequence[Guess]], console: Console) -> None:
    """Prints the text and, side by side, the guesses for each of its masks; tokens as they are, with their spaces, in quotes."""
    console.print(Text(text))
    table = Table(box=None, pad_edge=False, show_header=len(found) > 1)
    for number in range(len(found)):
        table.add_column(f"mask {number + 1}")
        table.add_column(justify="right")
    for guesses in zip(*found, strict=True):
        table.add_row(*(cell for guess in guesses for cell in (Text(repr(guess.text)), f"{guess.probability:.2%}")))
    console.print(table)


class _Callable(types.ModuleType):
    """This module under its other name: `jaxllm.fill_mask(...)` is the function of the API, also after `import jaxllm.fill_mask`,
    which puts the module in its place."""

    __call__ = staticmethod(api.fill_mask)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    define_flags()
    command.run(main)
