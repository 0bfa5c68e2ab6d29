"""What a reward model says of answers: a number each, of which only differences mean something: s(r - r') is the probability that the
first of two answers to a prompt is the better one.

A conversation is encoded as in training: the chat template writes it, and it ends with the token that ends its last message, the answer.
Letters: N conversations, B rows, T length.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.data import pack
from jaxllm.data.chat import answers as chat
from jaxllm.data.documents import Message
from jaxllm.data.examples.sequence_classification import ENCODERS
from jaxllm.data.sources import conversations as sources
from jaxllm.decode import batching
from jaxllm.models import heads
from jaxllm.parallel import processes
from jaxllm.parallel.plan import Plan
from jaxllm.types import Model, Params, Tokenizer


class RewardModel:
    """A model with one class at its head, and its tokenizer. ValueError for another model, and for a tokenizer without a chat template.

    plan: the mesh over whose devices rows are shared out, on which the parameters then lie, and for which the model was built without
    constraints; None: one device. Each process of a mesh must ask for the same, and gets all of it.
    """

    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer, plan: Plan | None = None):
        if model.config.head != "classify" or model.config.classes != 1:
            raise ValueError(
                f"this model gives no reward (model.head = '{model.config.head}', model.classes = {model.config.classes}).\n"
                "  Accepted: model.head = 'classify' with one class, as train.objective = 'reward' trains it.\n  Use another model."
            )
        self._model, self._params, self._plan = model, params, plan
        self._tokenizer, self._encode = tokenizer, chat.make(tokenizer, "last")

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], fields: Mapping[str, Sequence[Any]] | None = None
    ) -> np.ndarray:
        """float32 [N]: the reward of each answer to its prompt, as reinforcement learning asks for it.

        fields: under "messages" may stand the conversations that the answers go on from; without it each prompt is a question.
        """
        asked = (fields or {}).get("messages") or [[_said("user", prompt)] for prompt in prompts]
        return self.score([[*messages, _said("assistant", answer)] for messages, answer in zip(asked, answers, strict=True)])

    def score(self, conversations: Sequence[Sequence[Message]]) -> np.ndarray:
        """float32 [N]: the reward of the last message of each; ValueError for a conversation that cannot be scored."""
        encoded = []
        for number, messages in enumerate(conversations):
            try:
                encoded.append(self.encode(messages))
            except chat.Refused as error:
                raise ValueError(
                    f"conversation {number} cannot be scored: {error}.\n  Accepted: messages of which the last one is the assistant's, as"
                    f" the chat template writes them, within {self._model.config.context_tokens} tokens.\n  Leave it out, or shorten it."
                ) from error
        return self.score_ids(encoded)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to the token that ends its answer; chat.Refused, in a few words, if it cannot be scored."""
        if why := sources.flaw(messages):
            raise chat.Refused(why)
        ids, trained, _ = self._encode(messages)
        ids = ids[: int(np.flatnonzero(trained)[-1]) + 1]
        if len(ids) > self._model.config.context_tokens:
            raise chat.Refused(f"{len(ids):,} tokens, more than model.context_tokens")
        return ids.tolist()

    def score_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The same of conversations as ids, none empty or longer than the context: what policy and reward model read alike."""
        found = np.zeros(len(rows), np.float32)
        for chosen in batching.group([len(row) for row in rows]):
            mine = [rows[index] for index in chosen]
            pack.check_ids(np.concatenate(mine), self._tokenizer)
            found[chosen] = self._score(mine)[: len(mine)]
        return found

    def _score(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [B], in few distinct shapes; the first are those of the rows."""
        tokens_BT, lengths_B = batching.rectangle(rows, self._model.config.context_tokens)
        first = self._model.name in ENCODERS
        arrays: list[Any] = [tokens_BT, lengths_B, np.zeros_like(lengths_B) if first else lengths_B - 1]
        if self._plan is not None:
            spare = -len(tokens_BT) % self._plan.batch_parts
            sharding = NamedSharding(self._plan.mesh, PartitionSpec(self._plan.tables.parameters["batch"]))
            padded = [np.pad(array, [(0, spare)] + [(0, 0)] * (array.ndim - 1), mode="edge") for array in arrays]
            arrays = [jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for array in padded]
        found: np.ndarray = processes.fetch(_rewards(self._model.hidden, self._model.head, self._params, *arrays))
        return found


@partial(jax.jit, static_argnums=range(2))
def _rewards(
    hidden: Callable[..., jax.Array],
    head: Callable[[Params], Any],
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    places_B: jax.Array,
) -> jax.Array:
    segments_BT = (jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = hidden(params, tokens_BT, segments=segments_BT)
    return heads.logits(jnp.take_along_axis(hidden_BTD, places_B[:, None, None], axis=1)[:, 0], head(params))[:, 0]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
