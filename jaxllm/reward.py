"""Says what a reward model thinks of answers: a number each; the higher one is the better answer to the same prompt.

  python -m jaxllm.reward --run DIR --prompt "Say hello." --answer "Hello!" --answer "No."
  python -m jaxllm.reward --run DIR --data FILE.jsonl > SCORED.jsonl

--data is JSON Lines (or one JSON array) of conversations, as the objective sft reads them, whose last message is scored, and of pairs with
"chosen" and "rejected". Each row comes out as it was, with "reward", or "chosen_reward" and "rejected_reward"; null, with the reason in
"not_scored", where there is none.
"""

import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxllm import api, command
from jaxllm.data import pack
from jaxllm.data.chat.answers import Refused
from jaxllm.data.documents import Message
from jaxllm.data.sources import conversations, jsonl, preferences
from jaxllm.decode.reward_model import RewardModel
from jaxllm.engine import compilation

BLOCK_ROWS = 1024
WHY = "not_scored"


def define_flags() -> None:
    flags.DEFINE_string("run", "", "run directory of a trained reward model, or a directory of weights with one label")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest")
    flags.DEFINE_string("base", "", "of an adapter: the model that it stands beside; default: the path that the adapter names")
    flags.DEFINE_string("prompt", "", "what is answered")
    flags.DEFINE_multi_string("answer", [], "answer to the prompt, may be given several times")
    flags.DEFINE_string("data", "", "JSON Lines of conversations or of pairs, to be written with their rewards")


def main(arguments: list[str]) -> None:
    del arguments
    given = flags.FLAGS
    if bool(given.data) == bool(given.answer):
        what = "both --data and --answer" if given.data else "nothing to score"
        raise ValueError(
            f'{what}.\n  Accepted: --prompt "Say hello." --answer "Hello!", the latter once or several times; or --data FILE.jsonl.\n'
            "  Give one of the two."
        )
    compilation.use_cache()
    scorer = api.reward_model(given.run, given.step, base=given.base)
    if given.data:
        write(scorer, given.data)
        return
    show(given.answer, scorer([given.prompt] * len(given.answer), given.answer), Console(soft_wrap=True))


def show(answers: Sequence[str], rewards: np.ndarray, console: Console) -> None:
    """Prints each answer with its reward, and of two how likely the first is the better one."""
    table = Table(Column("reward", justify="right"), "answer")
    for answer, reward in zip(answers, rewards.tolist(), strict=True):
        table.add_row(f"{reward:.4f}", Text(answer))
    console.print(table)
    if len(answers) == 2:
        p = 1 / (1 + np.exp(np.float64(rewards[1] - rewards[0])))
        console.print(f"the first is better with probability {p:.1%}", highlight=False)


def write(scorer: RewardModel, data: str) -> None:
    """Prints the rows of a file with their rewards, and says how many have none."""
    rows, without = 0, 0
    for row in scored(scorer, data):
        print(json.dumps(row, ensure_ascii=False), flush=rows % BLOCK_ROWS == 0)
        rows, without = rows + 1, without + (WHY in row)
    logging.info("%s: %d rows, %d of them without a reward", data, rows, without)


def scored(scorer: RewardModel, data: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with their rewards; ValueError for a row that is neither a conversation nor a pair."""
    for block in pack.grouped(jsonl.objects(data), BLOCK_ROWS):
        asked = [_asked(row, origin) for row, origin in block]
        encoded = [_encode(scorer, each) for each in asked]
        found = iter(scorer.score_ids([ids for each in encoded if isinstance(each, list) for ids in each]).tolist())
        for (row, _), each, ids in zip(block, asked, encoded, strict=True):
            if isinstance(ids, str):
                yield row | dict.fromkeys(each) | {WHY: ids}
            else:
                yield row | {name: next(found) for name in each}


def _asked(row: Any, origin: str) -> dict[str, Sequence[Message]]:
    """The conversations of a row, by the fields that get their rewards."""
    if isinstance(row, dict) and preferences.CHOSEN in row:
        pair = preferences.read_pair(row, "auto", preferences.PROMPTS["prompt"], origin)
        both = zip((preferences.CHOSEN, preferences.REJECTED), pair.answers, strict=True)
        asked: dict[str, Sequence[Message]] = {f"{name}_reward": [*pair.messages, *answer] for name, answer in both}
    else:
        asked = {"reward": conversations.read(row, "auto", ("prompt", "completion"), origin).messages}
    if there := [name for name in (*asked, WHY) if name in row]:
        raise ValueError(
            f"{origin} has a field '{there[0]}' already.\n  Accepted: rows without {', '.join((*asked, WHY))}, which are written here.\n"
            "  Rename it."
        )
    return asked


def _encode(scorer: RewardModel, asked: Mapping[str, Sequence[Message]]) -> list[list[int]] | str:
    """The ids of the conversations of a row, or why they cannot be scored."""
    try:
        return [scorer.encode(messages) for messages in asked.values()]
    except Refused as error:
        return str(error)


class _Callable(types.ModuleType):
    """This module under its other name: `jaxllm.reward(...)` is the function of the API, also after `import jaxllm.reward`, which puts the
    module in its place."""

    __call__ = staticmethod(api.reward)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    define_flags()
    command.run(main)
