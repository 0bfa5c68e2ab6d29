"""Sums to be added up, as conversations: `sums`, or `sums:count=4000&digits=2&first=0&seed=0`.

    12+7=        19

No pair of numbers comes twice (7+12= is another one than 12+7=), so that held-out ones are new to the model. `first` goes on behind others:
what is held out of a model that learns by turns from examples and from its own answers should be the same (data.validation_source).
"""

import urllib.parse
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data import order
from jaxllm.data.documents import Document
from jaxllm.data.sources import conversations, prompts

DEFAULTS = {"count": 4000, "digits": 2, "first": 0, "seed": 0}
MOST_DIGITS = 9


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """`count` sums of two numbers from 0 to 10^digits - 1, the same ones each time; another seed gives others.

    Where the model is to answer itself, a prompt with the field "answer".
    """
    asks = registry.resolve("examples", config.train.objective)(config).reads == "prompts"
    options = parse(location)
    numbers = 10 ** options["digits"]
    for place in range(options["first"], options["first"] + options["count"]):
        pair = order.permute(numbers**2, options["seed"], np.zeros(1, np.uint64), np.array([place], np.uint64))
        left, right = divmod(int(pair[0]), numbers)
        question, answer = {"role": "user", "content": f"{left}+{right}="}, str(left + right)
        messages = [question] if asks else [question, {"role": "assistant", "content": answer}]
        found = conversations.document(messages, f"sums:{left}+{right}")
        yield found._replace(fields={prompts.ANSWER: answer}) if asks else found


def parse(location: str) -> dict[str, int]:
    """The options; ValueError for an unknown one, and for more sums than there are."""
    given = dict(urllib.parse.parse_qsl(location, keep_blank_values=True))
    unknown = sorted(set(given) - set(DEFAULTS))
    wrong = [name for name, value in given.items() if not value.isdecimal()]
    options = DEFAULTS | {name: int(value) for name, value in given.items() if name not in (*unknown, *wrong)}
    what = ""
    if unknown or wrong:
        what = f"unknown option '{unknown[0]}'" if unknown else f"{wrong[0]} = '{given[wrong[0]]}' is no whole number"
    elif not 1 <= options["digits"] <= MOST_DIGITS:
        what = f"digits = {options['digits']} is not from 1 to {MOST_DIGITS}"
    elif options["count"] < 1 or options["first"] + options["count"] > 100 ** options["digits"]:
        what = f"first = {options['first']} and count = {options['count']}, of {100 ** options['digits']} pairs of such numbers"
    if what:
        raise ValueError(
            f"'sums:{location}': {what}.\n  Accepted: sums, or sums:count=4000&digits=2&first=0&seed=0 or some of these.\n"
            "  Correct the name."
        )
    return options
