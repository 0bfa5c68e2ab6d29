"""What an answer is worth: functions by name, or of one's own, and their weighted sum.

A reward is `(prompts, answers, fields) -> a number an answer`. prompts, answers: texts. fields: lists as long by their names, what the
data knows of the prompt (None where it does not), such as "answer"; and of the answer "tokens", how many it has, and "ended", whether it
came to its end. Config: `rl.rewards`, pairs of a name and a weight. A name with a colon, "package.module:function", is a function of one's
own, which must give the same numbers for the same texts each time.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data.sources.prompts import ANSWER

Fields = Mapping[str, Sequence[Any]]
Reward = Callable[[Sequence[str], Sequence[str], Fields], Sequence[float] | np.ndarray]

# The mark before the result of a GSM8K answer (Cobbe et al. 2021, arXiv:2110.14168).
RESULT = "####"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


class Rewards(NamedTuple):
    """The reward of the config. parts: (name, function, weight) of each that it is the sum of."""

    parts: tuple[tuple[str, Reward, float], ...]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], fields: Fields) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(the weighted sum, each reward by its name), float64 [answers]. ValueError for other than a finite number an answer."""
        found = {name: _checked(name, reward(prompts, answers, fields), len(answers)) for name, reward, _ in self.parts}
        total = np.zeros(len(answers))
        for name, _, weight in self.parts:
            total += weight * found[name]
        return total, found


def make(config: ConfigDict) -> Rewards:
    """The sum that rl.rewards describes; ValueError for a name that nothing has."""
    return Rewards(tuple((name, _resolve(name, config), float(weight)) for name, weight in config.rl.rewards))


def _resolve(name: str, config: ConfigDict) -> Reward:
    module, _, attribute = name.partition(":")
    if not attribute:
        reward: Reward = registry.resolve("reward", name)(config)
        return reward
    try:
        own: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"rl.rewards: '{name}' cannot be imported: {error}.\n  Accepted: {', '.join(registry.names('reward'))}, or"
            " package.module:function of a module that Python finds from here.\n  Correct the name, or set PYTHONPATH."
        ) from error
    return own


def _checked(name: str, values: Sequence[float] | np.ndarray, answers: int) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.shape != (answers,) or not np.isfinite(found).all():
        what = f"numbers of shape {found.shape}" if found.shape != (answers,) else f"{found[~np.isfinite(found)][0]} for an answer"
        raise ValueError(
            f"the reward '{name}' gives {what}, for {answers} answers.\n  Accepted: one finite number an answer.\n  Correct the function."
        )
    return found


def exact_match(config: ConfigDict) -> Reward:
    """1 where the answer is that of the data, white space around it aside."""
    name = config.data.target_field

    def reward(prompts: Sequence[str], answers: Sequence[str], fields: Fields) -> list[float]:
        del prompts
        return [float(answer.strip() == wanted.strip()) for answer, wanted in zip(answers, _wanted(fields, name), strict=True)]

    return reward


def number(config: ConfigDict) -> Reward:
    """1 where the answer's last number equals that of the data; in both what stands behind the last "####", if there is one."""
    name = config.data.target_field

    def reward(prompts: Sequence[str], answers: Sequence[str], fields: Fields) -> list[float]:
        del prompts
        pairs = zip(answers, _wanted(fields, name), strict=True)
        return [float((found := last_number(answer)) is not None and found == last_number(wanted)) for answer, wanted in pairs]

    return reward


def join(beside: Sequence[Mapping[str, Any]], drawn: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The fields of rewards: `beside` of the prompts of all answers, and those of `drawn`, which may not have the same names."""
    names = dict.fromkeys(name for each in beside for name in each)
    return {name: [each.get(name) for each in beside] for name in names} | dict(drawn)


def _wanted(fields: Fields, name: str) -> list[str]:
    """The answers of the data: in the field of this name, or "answer" where there is none. ValueError if one is missing."""
    found = fields.get(name, fields.get(ANSWER, [None]))
    if any(answer is None for answer in found):
        raise ValueError(
            f"a reward compares with the answer in the data, and a prompt has none: its fields are {', '.join(fields)}.\n"
            f"  Accepted: the field '{name}' (data.target_field) or '{ANSWER}' beside each prompt, or messages that end with an answer.\n"
            "  Set data.target_field, or take the reward out of rl.rewards."
        )
    return [str(answer) for answer in found]


def last_number(text: str) -> Decimal | None:
    """1234.5 of "... is $1,234.50.": the last number of a text, or of what stands behind its last "####"; None without one.

    A minus counts where nothing that could be subtracted from stands before it.
    """
    text = text.rpartition(RESULT)[2]
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    written = last[0].replace(",", "")
    before = text[: last.start()].rstrip()
    if written[0] in "+-" and (before[-1:].isalnum() or before.endswith(")")):
        written = written[1:]  # 5-3, a difference
    try:
        value = Decimal(written)
    except InvalidOperation:
        return None
    # -$5
    return -value if written[0].isdigit() and re.search(r"-\s*[$€£]\s*$", text[: last.start()]) else value


def form(config: ConfigDict) -> Reward:
    """1 where all of the answer matches the regular expression rl.format."""
    pattern = re.compile(config.rl.format, re.DOTALL)

    def reward(prompts: Sequence[str], answers: Sequence[str], fields: Fields) -> list[float]:
        del prompts, fields
        return [float(pattern.fullmatch(answer.strip()) is not None) for answer in answers]

    return reward


def length(config: ConfigDict) -> Reward:
    """0 up to rl.max_new_tokens - rl.soft_tokens, from there down to -1 at the former (Yu et al. 2025, arXiv:2503.14476, eq. 13)."""
    most, soft = config.rl.max_new_tokens, config.rl.soft_tokens

    def reward(prompts: Sequence[str], answers: Sequence[str], fields: Fields) -> np.ndarray:
        del prompts, answers
        return np.clip((most - soft - np.array(fields["tokens"], np.float64)) / soft, -1, 0)

    return reward
