"""A block of what the model learns from its own answers: drawn, rewarded, scored by the trainer's own forward pass, packed.

Nothing but (seed, step, state) decides it, so that a block can be made again. Letters: M batches of a block, P prompts of a batch, R
answers of a batch, N tokens of an answer, B rows, T row length.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import models
from jaxllm.data import experience, order
from jaxllm.data.chat import encoding
from jaxllm.data.examples import prompts as stored_prompts
from jaxllm.data.prepare import Prepared
from jaxllm.data.shards import Shards
from jaxllm.decode import generate, rewards, rollouts
from jaxllm.engine import advantages
from jaxllm.engine.advantages import Answers
from jaxllm.engine.session import Session
from jaxllm.engine.state import TrainState, full_params, random_key
from jaxllm.evals import answers as evals
from jaxllm.models import heads
from jaxllm.objectives import policy, policy_losses
from jaxllm.parallel import measure, processes
from jaxllm.transforms import tree
from jaxllm.types import Batch, Model, Params, Unconstrained

ROWS_AT_ONCE = 1024
# Prompts of a block whose answers are shown.
SHOWN = 2


class Block(NamedTuple):
    """batches: the arrays [M, B, T] of M batches. rows_MP: which prompts they are of. row: metrics. shown: some of the answers."""

    batches: dict[str, np.ndarray]
    rows_MP: np.ndarray
    row: dict[str, float]
    shown: str


class Maker:
    """Makes the blocks of a run. reference: the trained parameters before step 0; None if rl.kl = 0, which needs none."""

    def __init__(self, session: Session, prepared: Prepared, reference: Params | None):
        self._session, self._prepared, self._reference = session, prepared, reference
        config = session.config
        self._rl, self.batches = config.rl, config.rl.refresh_steps // config.rl.epochs
        self._shape = config.train.batch_seqs, session.row_tokens
        self._stop_ids, self._rewards = encoding.answer_stop_ids(prepared.tokenizer), rewards.make(config)
        longest = longest_prompt(prepared.train)
        _check_room(config, longest, self._shape)
        self._sampler = rollouts.Sampler(
            make_writer(session),
            answers=self._rl.answers,
            most_tokens=self._rl.max_new_tokens,
            temperature=self._rl.temperature,
            stop_ids=self._stop_ids,
            vocab_size=prepared.tokenizer.vocab_size,
            longest=longest,
        )
        self._score, self._learn = make_score(session), advantages.FORMS[config.train.objective]

    def make(self, step: int, state: TrainState, before: Mapping[str, float] | None) -> Block:
        """The block that is learnt from in the updates step + 1, step + 2, ..., made by the model of `state`.

        before: `row` of the block before it, None for the first one.
        """
        began, first = time.perf_counter(), step // self._rl.refresh_steps * self.batches
        numbers = range(first, first + self.batches)
        rows_MP = np.stack([self.rows(number) for number in numbers])
        found = [self._answer(rows_P, number, state) for rows_P, number in zip(rows_MP, numbers, strict=True)]
        learnt = self._learn(self._rl, found, before)
        mean_tokens = sum(each.counted_R.sum() for each in found) / self.batches
        made = [self._arrays(each, values_RN, mean_tokens) for each, values_RN in zip(found, learnt.batches, strict=True)]
        batches = {name: np.stack([each[name] for each in made]) for name in made[0]}
        row = self._row(found) | learnt.row | {"rollout_secs": round(time.perf_counter() - began, 3)}
        return Block(batches, rows_MP, row, self._show(found[0]))

    def rows(self, number: int) -> np.ndarray:
        """int64 [P]: the prompts of batch `number`, counted from the beginning of the run."""
        return order.batch_rows(len(self._prepared.train), self._rl.prompts, self._session.config.seed, number)

    def _answer(self, rows_P: np.ndarray, number: int, state: TrainState) -> Answers:
        """Answers to these prompts, rewarded and scored."""
        stored, tokenizer = self._prepared.train.rows(rows_P), self._prepared.tokenizer
        prompts, params = stored_prompts.prompts(stored), full_params(state)
        rng = jax.random.fold_in(random_key(self._session.config.seed, "answers"), number)
        drawn = self._sampler.draw(params, prompts, rng)
        each = [prompt for prompt in prompts for _ in range(self._rl.answers)]
        written = [ids[:length].tolist() for ids, length in zip(drawn.tokens_RN, drawn.lengths_R, strict=True)]
        texts = evals.spell(tokenizer, [ids.tolist() for ids in each], [generate.strip(ids, self._stop_ids) for ids in written])
        beside = [each for each in stored_prompts.fields(stored) for _ in range(self._rl.answers)]
        fields = rewards.join(beside, {"tokens": drawn.lengths_R.tolist(), "ended": drawn.ended_R.tolist()})
        rewards_R, parts = self._rewards(*texts, fields)
        layout, arrays = experience.lay(each, drawn.tokens_RN, drawn.lengths_R, self._shape, tokenizer.pad_id)
        old_RN, values_RN = (layout.gather(each_BT, drawn.tokens_RN) for each_BT in self._score(params, arrays))
        reference_RN = old_RN
        if self._reference is not None:
            reference_BT, _ = self._score(tree.combine(self._reference, state.frozen), arrays)
            reference_RN = layout.gather(reference_BT, drawn.tokens_RN)
        counted_R = self._counted(drawn)
        return Answers(each, drawn, texts, rewards_R, parts, layout, arrays, old_RN, reference_RN, values_RN, counted_R)

    def _counted(self, drawn: rollouts.Drawn) -> np.ndarray:
        """int32 [R]: tokens of each answer that count."""
        rl = self._rl
        return np.where(drawn.ended_R | (not rl.mask_truncated), drawn.lengths_R, 0)

    def _arrays(self, answers: Answers, learnt: Mapping[str, np.ndarray], mean_tokens: float) -> dict[str, np.ndarray]:
        """The arrays [B, T] of a batch."""
        rl, counted_R = self._rl, answers.counted_R
        weights_R = policy_losses.token_weights(rl.loss, counted_R, rl.max_new_tokens, mean_tokens) * (counted_R > 0)
        values = {"weights": weights_R[:, None] * np.ones_like(answers.old_RN), "old": answers.old_RN, **learnt}
        return answers.arrays | {name: answers.layout.spread(values_RN) for name, values_RN in values.items()}

    def _row(self, found: Sequence[Answers]) -> dict[str, float]:
        """Metrics of a block, means over its answers or their tokens."""
        rewards_R = np.concatenate([each.rewards_R for each in found])
        lengths_R = np.concatenate([each.drawn.lengths_R for each in found])
        inside_RN = np.arange(self._rl.max_new_tokens) < lengths_R[:, None]
        old_RN, sampled_RN, reference_RN = (
            np.concatenate(arrays)
            for arrays in zip(*((each.old_RN, each.drawn.log_p_RN, each.reference_RN) for each in found), strict=True)
        )
        alike = np.ptp(rewards_R.reshape(-1, self._rl.answers), axis=1) == 0
        row = {"reward": rewards_R.mean(), "reward_std": rewards_R.std()}
        row |= evals.named({name: np.mean([each.parts[name] for each in found]) for name in found[0].parts})
        row |= {"alike": alike.mean(), "answer_tokens": lengths_R.mean()}
        row |= {
            "truncated": 1 - np.concatenate([each.drawn.ended_R for each in found]).mean(),
            "entropy": -old_RN[inside_RN].mean(),
        }
        if self._reference is not None:
            row["kl"] = (old_RN - reference_RN)[inside_RN].sum() / len(lengths_R)
        row["sampler_difference"] = np.abs(old_RN - sampled_RN)[inside_RN].max()
        return {name: float(value) for name, value in row.items()}

    def _show(self, answers: Answers) -> str:
        """Some prompts and their answers, with what these are worth."""
        lines = []
        for number in range(min(SHOWN * self._rl.answers, len(answers.prompts))):
            prompt, answer = (texts[number] for texts in answers.texts)
            lines += [f">>> {prompt}"] if number % self._rl.answers == 0 else []
            lines.append(f"{answers.rewards_R[number]:+.2f} {answer}")
        return "\n".join(lines)


def longest_prompt(shards: Shards) -> int:
    """Tokens of the longest stored prompt."""
    blocks = (np.arange(start, min(start + ROWS_AT_ONCE, len(shards))) for start in range(0, len(shards), ROWS_AT_ONCE))
    return max(int(shards.rows(block)["segments"].sum(1).max()) for block in blocks)


def make_writer(session: Session) -> Model:
    """The model of the session for drawing answers, whose arrays the compiler lays out."""
    return models.build(session.config, Unconstrained("the compiler alone decides where the arrays of answers lie"))


def make_score(session: Session) -> Callable[[Params, Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
    """score(params, arrays [B, T]) -> (log-probabilities of the targets, values, 0 without a value head), both [B, T].

    By the forward pass that is trained, on its mesh.
    """
    temperature, chunk_tokens = session.config.rl.temperature, session.config.train.loss_chunk_tokens

    def numbers(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = session.model.hidden(params, batch["tokens"], **{name: batch[name] for name in policy.READ}, rng=None)
        head = session.model.head(params)
        log_p_BT = policy.log_probs(hidden_BTD, head, batch["targets"], temperature, chunk_tokens)
        return log_p_BT, jnp.zeros_like(log_p_BT) if head.value is None else heads.values(hidden_BTD, head)

    sharding = session.plan.batch_sharding()
    compiled = jax.jit(measure.tokens(numbers, session.region), out_shardings=sharding)

    def score(params: Params, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = processes.fetch(compiled(params, place(arrays, sharding)))
        return found

    return score


def place(arrays: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Arrays [B, T], which every process has, on the mesh."""
    return {name: jax.make_array_from_callback(array.shape, sharding, partial(_part, array)) for name, array in arrays.items()}


def _part(array: np.ndarray, index: tuple[slice, ...]) -> Any:
    return array[index]


def _check_room(config: Any, longest: int, shape: tuple[int, int]) -> None:
    """ValueError unless the answers of a step fit into a batch, however long they turn out."""
    rl, (seqs, width) = config.rl, shape
    room, wanted = experience.least_answers(longest, rl.max_new_tokens, seqs, width), rl.prompts * rl.answers
    if wanted > room:
        segment = longest + rl.max_new_tokens - 1
        needed = -(-wanted // (width // segment)) if width >= segment else 0
        raise ValueError(
            f"rl.prompts x rl.answers = {rl.prompts} x {rl.answers} = {wanted} answers a step, of up to {segment} tokens with"
            f" their prompts, in train.batch_seqs = {seqs} rows of {width} tokens.\n  Accepted: up to {room} answers in so many rows.\n"
            f"  Lower rl.prompts, rl.answers or rl.max_new_tokens, or set train.batch_seqs={needed} or more."
        )


def describe(row: Mapping[str, float]) -> str:
    """The metrics of answers as a line: what they are worth, and what stands out."""
    found = [
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if name.startswith("reward") and name != "reward_std"
    ]
    found += [f"{row['answer_tokens']:.1f} tokens an answer"]
    found += [f"{name} {row[name]:.3g}" for name in ("truncated", "kl") if row.get(name)]
    return ", ".join(found)
