"""Batches of answers that the model wrote itself, a `types.Source` that a hook refreshes: the loop and the step know nothing of it.

Every rl.refresh_steps updates the model of that moment writes a block of answers, from which the next updates learn. A block is a file of
WORKDIR/rollouts, so that a run that was stopped in the middle of one goes on with it, to the bit.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.examples import prompts as stored_prompts
from jaxllm.decode import rewards
from jaxllm.engine import answers
from jaxllm.engine.answers import Block, Maker
from jaxllm.engine.feed import Feed, Setting, Tell
from jaxllm.engine.hooks import Row
from jaxllm.engine.loop import Hook
from jaxllm.engine.state import TrainState, eval_params
from jaxllm.engine.trackers import jsonl
from jaxllm.engine.workdir import sync_directory
from jaxllm.evals import answers as evals
from jaxllm.parallel import processes
from jaxllm.transforms import tree
from jaxllm.types import Params

KIND = "rollouts"


class OnPolicy:
    """A `types.Source` of the blocks of one run."""

    def __init__(self, setting: Setting, state: TrainState, tell: Tell, maker: Maker):
        rl = setting.session.config.rl
        self._setting, self._news, self._maker, self._steps = setting, tell, maker, rl.refresh_steps
        self._carries = rl.kl_target > 0  # the KL coefficient follows from one block to the next
        self._store = Store(setting.directory / KIND)
        self._total = setting.session.config.train.steps
        self._sharding = setting.session.plan.batch_sharding()
        self._block = self._begin(setting.start, state)

    def batch(self, step: int) -> Mapping[str, jax.Array]:
        number = step % self._steps % self._maker.batches
        return answers.place({name: array[number] for name, array in self._block.batches.items()}, self._sharding)

    def rows(self, step: int) -> np.ndarray:
        """int64 [P]: the prompts of the batch of this step."""
        return self._maker.rows(step // self._steps * self._maker.batches + step % self._steps % self._maker.batches)

    def refresh(self, step: int, state: TrainState) -> None:
        """A hook: after the last update from a block makes the next one."""
        if step % self._steps == 0 and step < self._total:
            self._block = self._make(step, state, self._block.row)

    def _begin(self, start: int, state: TrainState) -> Block:
        """The block of update start + 1: from its file, or made where a block begins."""
        first = start - start % self._steps
        if start == 0 and processes.is_first():
            self._store.clear()  # of a run that was begun anew
        if start and (block := self._store.load(first)) is not None:
            return block
        before = self._store.load(start - self._steps) if start and first == start else None
        if first != start or (start and self._carries and before is None):
            what, gone = f"in the middle of the answers that it drew at step {first}", first
            if first == start:
                what, gone = f"with the KL coefficient of the answers of step {start - self._steps}", start - self._steps
            raise ValueError(
                f"this run goes on {what}, and '{self._store.path(gone)}' is gone.\n"
                f"  Accepted: the file of this run; or a checkpoint of a step that rl.refresh_steps = {self._steps} divides.\n"
                "  Put it back, or use another --workdir."
            )
        return self._make(start, state, before.row if before else None)

    def _make(self, step: int, state: TrainState, before: Mapping[str, float] | None) -> Block:
        block = self._maker.make(step, state, before)
        if processes.is_first():
            self._store.save(step, block)
            self._store.drop_before(min(self._setting.kept(), default=0) // self._steps * self._steps)
        self._tell(step, block)
        return block

    def _tell(self, step: int, block: Block) -> None:
        """Writes the metrics of a block and some of its answers, once."""
        if jsonl.find(self._setting.directory, KIND, step) is not None:
            return
        self._news.write({"kind": KIND, "step": step, **block.row})
        self._news.text(step, "answers", block.shown)
        self._news.message(f"step {step}: {answers.describe(block.row)}")


class Store:
    """Blocks as files, by the step at which they were made."""

    def __init__(self, directory: Path):
        self._directory = directory

    def path(self, step: int) -> Path:
        return self._directory / f"{step}.npz"

    def save(self, step: int, block: Block) -> None:
        """Writes it at once: a reader finds all of it or nothing."""
        self._directory.mkdir(parents=True, exist_ok=True)
        beside = {"rows": block.rows_MP, "row": np.array(json.dumps(block.row)), "shown": np.array(block.shown)}
        arrays: Any = beside | {f"batch/{name}": array for name, array in block.batches.items()}
        temporary = self._directory / "partial"
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path(step))
        sync_directory(self._directory)

    def load(self, step: int) -> Block | None:
        """None if there is none."""
        if not self.path(step).is_file():
            return None
        with np.load(self.path(step), allow_pickle=False) as file:
            batches = {name.removeprefix("batch/"): file[name] for name in file.files if name.startswith("batch/")}
            return Block(batches, file["rows"], json.loads(str(file["row"])), str(file["shown"]))

    def drop_before(self, step: int) -> None:
        """Deletes the blocks of earlier steps, which no checkpoint needs any more."""
        for path in self._directory.glob("*.npz"):
            if path.stem.isdecimal() and int(path.stem) < step:
                path.unlink()

    def clear(self) -> None:
        for path in self._directory.glob("*.npz"):
            path.unlink()


def make(setting: Setting, state: TrainState, tell: Tell) -> Feed:
    """Answers to the prompts of the training data, and greedy answers to the held-out ones as validation."""
    session = setting.session
    reference = _reference(setting, state) if session.config.rl.kl else None
    maker = Maker(session, setting.prepared, reference)
    setting.watchdog.beside("drawing answers", setting.start)
    source = OnPolicy(setting, state, tell, maker)
    hook = Hook(setting.watchdog.around("drawing answers", source.refresh), session.config.rl.refresh_steps)
    # Where all answers to a prompt are worth the same, there is nothing to learn from them: no update must change anything.
    first_moves = dict.fromkeys(tree.names(session.abstract.params), 0)
    return Feed(source, (hook,), _evaluation(setting), first_moves, lambda: None)


def _reference(setting: Setting, state: TrainState) -> Params:
    """A copy of what is trained as it was before step 0; adapters there change nothing yet."""
    params = state.params if setting.start == 0 else setting.first().params
    copied: Params = jax.tree.map(jnp.copy, params)
    return copied


def _evaluation(setting: Setting) -> Any:
    session, prepared = setting.session, setting.prepared
    config, shards = session.config, prepared.validation
    count = min(config.eval.max_seqs or len(shards), len(shards))
    stored = shards.rows(np.arange(count) * len(shards) // max(count, 1))
    measure = partial(
        evals.measure,
        answers.make_writer(session),
        tokenizer=prepared.tokenizer,
        prompts=stored_prompts.prompts(stored),
        beside=stored_prompts.fields(stored),
        rewards=rewards.make(config),
        most_tokens=config.rl.max_new_tokens,
    )

    def evaluate(state: TrainState) -> Row:
        return measure(eval_params(state))

    return evaluate
