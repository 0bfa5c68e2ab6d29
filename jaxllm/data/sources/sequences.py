"""Pairs of random strings, the toy task of an encoder-decoder: `sequences:copy` and `sequences:reverse`.

The target is the string itself, or its symbols in reverse order. No string comes twice, so that held-out ones are new to the model.
"""

import string
import urllib.parse
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import noise
from jaxllm.data.documents import Document

TASKS = {"copy": slice(None), "reverse": slice(None, None, -1)}
DEFAULTS = {"count": 20_000, "symbols": 20, "min": 4, "max": 16}
SYMBOLS = string.ascii_letters + string.digits
DRAWN_AT_ONCE = 1024


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """The pairs of `copy` or `reverse`, the same ones each time; `?count=20000&symbols=20&min=4&max=16` are the defaults.

    Lengths are uniform from min to max (as far as there are strings), symbols are the first ones of a-z, A-Z, 0-9.
    """
    del config
    task, options = parse(location)
    seen: set[str] = set()
    for start in range(0, options["count"], DRAWN_AT_ONCE):
        numbers = np.arange(start, min(start + DRAWN_AT_ONCE, options["count"]))
        for number, drawn in zip(numbers.tolist(), _draw(numbers, 0, options), strict=True):
            text, step = drawn, 0
            while text in seen:
                step += 1
                (text,) = _draw(np.array([number]), step, options)
            seen.add(text)
            yield Document(text, f"sequences:{task}[{number}]", text[TASKS[task]])


def _draw(numbers: np.ndarray, step: int, options: dict[str, int]) -> list[str]:
    """A string of pseudo-random length and symbols for each number, another one at each step."""
    low, high = options["min"], options["max"]
    draws = noise.uniforms(0, step, numbers, high + 1)
    lengths = low + (draws[:, 0] * (high - low + 1)).astype(int)
    symbols = (draws[:, 1:] * options["symbols"]).astype(int)
    return ["".join(SYMBOLS[each] for each in row[:length]) for row, length in zip(symbols.tolist(), lengths.tolist(), strict=True)]


def parse(location: str) -> tuple[str, dict[str, int]]:
    """(task, options); ValueError for an unknown task or option, and for more strings than there can be with ease."""
    task, _, query = location.partition("?")
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(given) - set(DEFAULTS))
    wrong = [name for name, value in given.items() if not value.isdecimal() or int(value) < 1]
    options = DEFAULTS | {name: int(value) for name, value in given.items() if name not in (*unknown, *wrong)}
    what = ""
    if task not in TASKS:
        what = f"unknown task '{task}'"
    elif unknown or wrong:
        what = f"unknown option '{unknown[0]}'" if unknown else f"{wrong[0]} = '{given[wrong[0]]}' is no whole number above 0"
    elif options["symbols"] > len(SYMBOLS):
        what = f"symbols = {options['symbols']} is more than the {len(SYMBOLS)} letters and digits"
    elif options["min"] > options["max"]:
        what = f"min = {options['min']} is more than max = {options['max']}"
    elif options["count"] > (most := sum(options["symbols"] ** size for size in range(options["min"], options["max"] + 1)) // 2):
        what = f"count = {options['count']} is more than half of the {2 * most} strings of this kind"
    if what:
        raise ValueError(
            f"'sequences:{location}': {what}.\n  Accepted: sequences:copy or sequences:reverse, then"
            " ?count=20000&symbols=20&min=4&max=16 or some of these.\n  Correct the name."
        )
    return task, options
