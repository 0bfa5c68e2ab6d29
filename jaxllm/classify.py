"""Says which class a classifier gives a text, a pair of texts, or each word of a text.

  python -m jaxllm.classify --run DIR --text "Good, but long." [--text "..."] [--pair "..."] [--top_k 5]

Of a model with a head 'classify' the likeliest classes of each text, of one with a head 'tag' the likeliest of each word. With --pair,
once for each --text and in the same order, the class is that of the two texts together.
"""

import sys
import types
from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxllm import api, command, runs
from jaxllm.data.examples.contract import row_tokens
from jaxllm.decode import classes
from jaxllm.decode.classes import Label, Word
from jaxllm.engine import compilation


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained classifier, or a directory of weights")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_multi_string("text", [], "text to classify, may be given several times")
    flags.DEFINE_multi_string("pair", None, "second text to classify together with --text, as many as these")
    flags.DEFINE_integer("top_k", 5, "likeliest classes shown of each text; of a word there is one")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    if not given.text:
        raise ValueError('no text is given.\n  Accepted: --text "Good, but long.", once or several times.\n  Add --text.')
    compilation.use_cache()
    run = runs.load(given.run, given.step, for_decoding=True)
    model = (run.model, run.params, run.tokenizer)
    width, console = row_tokens(run.config), Console(soft_wrap=True)
    if run.config.model.head == "tag" and given.pair is None:
        for words in classes.of_words(*model, given.text, names=run.classes, top_k=1, row_tokens=width):
            show_words(words, console)
        return
    found = classes.of_texts(*model, given.text, given.pair, names=run.classes, top_k=given.top_k, row_tokens=width)
    for order, (text, labels) in enumerate(zip(given.text, found, strict=True)):
        show_labels([text] if given.pair is None else [text, given.pair[order]], labels, console)


def show_labels(texts: Sequence[str], labels: Sequence[Label], console: Console) -> None:
    """Prints the text, or two, and its classes."""
    for text in texts:
        console.print(Text(text))
    _print_table([(Text(label.name), f"{label.probability:.2%}") for label in labels], console)


def show_words(words: Sequence[Word], console: Console) -> None:
    """Prints each word with its class, or with a dash where the model did not read it."""
    cells = [(word.labels[0].name, f"{word.labels[0].probability:.2%}") if word.labels else ("-", "") for word in words]
    _print_table([(Text(word.text), Text(name), p) for word, (name, p) in zip(words, cells, strict=True)], console)


def _print_table(rows: Sequence[tuple[Text | str, ...]], console: Console) -> None:
    """The last column, probabilities, to the right."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in range(len(rows[0])):
        table.add_column(justify="right" if column == len(rows[0]) - 1 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


class _Callable(types.ModuleType):
    """This module under its other name: `jaxllm.classify(...)` is the function of the API, also after `import jaxllm.classify`,
    which puts the module in its place."""

    __call__ = staticmethod(api.classify)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    define_flags()
    command.run(main)
