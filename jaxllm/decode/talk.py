"""A conversation with a model, turn after turn: its messages, and what the model is given of them to answer."""

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

from jaxllm.data.chat import encoding
from jaxllm.data.documents import Message
from jaxllm.decode import chat, generate
from jaxllm.decode.kept import Kept
from jaxllm.ops import sampling
from jaxllm.types import Model, Params, Tokenizer


class Answer(NamedTuple):
    """pieces: of its text, as soon as they are final. dropped: how many of the oldest messages the model was not given."""

    pieces: Generator[str]
    dropped: int


class Talk:
    """messages: the whole conversation so far. What no longer fits the context is left out of what the model reads.

    An answer joins the conversation when its pieces end, also if the reader stops early: close() them then.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        settings: sampling.Settings,
        *,
        system: str,
        max_tokens: int,
        seed: int,
    ) -> None:
        """ValueError for a tokenizer without a chat template, and as `set_system`."""
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._settings, self._max_tokens, self._seed = settings, max_tokens, seed
        self._kept, self._tries = Kept(), 0
        self.messages: list[Message] = []
        encoding.require(tokenizer)
        self.set_system(system)

    def set_system(self, content: str) -> None:
        """Puts the system's message at the beginning, in place of the one that is there; an empty one takes it away.

        ValueError, and an unchanged conversation, for a message that cannot be sent or that the template has no place for.
        """
        system: list[Message] = [{"role": "system", "content": content}] if content else []
        if system:
            encoding.encode(self._tokenizer, [*system, {"role": "user", "content": "a question"}])
        self.messages = [*system, *self._exchanges()]

    def use(self, model: Model, params: Params, tokenizer: Tokenizer) -> None:
        """Has this model answer from now on. The conversation stays; what the other one kept of it goes, and it is read again.

        ValueError, and an unchanged conversation, for a tokenizer without a chat template.
        """
        encoding.require(tokenizer)
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._kept = Kept()

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = self._system()

    def ask(self, content: str) -> Answer:
        """The answer to a message of the user. ValueError at once, and an unchanged conversation, for one that cannot be sent."""
        answer = self._answer([*self.messages, {"role": "user", "content": content}], tries=0)
        self._tries = 0
        return answer

    def retry(self) -> Answer:
        """Another answer to the last message, drawn with the next seed, in place of the one that is there; ValueError if none is."""
        self._check_asked()
        self._tries += 1
        return self._answer(self.messages[:-1], self._tries)

    def undo(self) -> str:
        """Takes the last message of the user and its answer out of the conversation: the message. ValueError if there is none."""
        self._check_asked()
        *self.messages, asked, _ = self.messages
        self._tries = 0
        return asked["content"]

    @property
    def greedy(self) -> bool:
        """Whether a message has only one answer."""
        return self._settings.temperature == 0

    def _system(self) -> list[Message]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _exchanges(self) -> Sequence[Message]:
        return self.messages[len(self._system()) :]

    def _check_asked(self) -> None:
        if not self._exchanges():
            raise ValueError("nothing has been asked yet.\n  Accepted: a conversation with an answer.\n  Write a message first.")

    def _answer(self, asked: list[Message], tries: int) -> Answer:
        context_tokens = self._model.config.context_tokens
        # Half of a small context stays for what was said before, however long an answer may be.
        prompt = chat.fit(self._tokenizer, asked, context_tokens, min(self._max_tokens, context_tokens // 2))
        pieces = chat.stream(
            self._model,
            self._params,
            self._tokenizer,
            prompt.ids,
            self._settings,
            max_new_tokens=min(self._max_tokens, context_tokens - len(prompt.ids)),
            seed=(self._seed + tries) % (generate.LARGEST_SEED + 1),
            kept=self._kept,
        )
        return Answer(self._keep(asked, pieces), prompt.dropped)

    def _keep(self, asked: list[Message], pieces: Iterable[str]) -> Generator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said.rstrip()}]
