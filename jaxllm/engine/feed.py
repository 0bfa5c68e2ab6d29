"""What a run is fed with: a source of batches, what happens beside the steps for its sake, and what is measured. Chosen by the objective.

Most objectives read rows that were prepared. Where the model itself makes what it learns from, the source is refreshed by a hook, and the
loop knows nothing of it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm import registry
from jaxllm.data import loader
from jaxllm.data.examples.contract import MakeBatch
from jaxllm.data.prepare import Prepared
from jaxllm.engine import evaluation, references
from jaxllm.engine.hooks import Row
from jaxllm.engine.loop import Hook
from jaxllm.engine.references import References
from jaxllm.engine.session import Session
from jaxllm.engine.state import TrainState
from jaxllm.engine.watchdog import Watchdog
from jaxllm.types import Source


class Setting(NamedTuple):
    """The run that is to be fed.

    referred: what the first state says of the data, where the objective asks for it. start: updates done. first: makes the state before
    step 0 anew. kept: the steps of the checkpoints.
    """

    session: Session
    prepared: Prepared
    referred: References | None
    directory: Path
    watchdog: Watchdog
    start: int
    first: Callable[[], TrainState]
    kept: Callable[[], Sequence[int]]


class Tell(NamedTuple):
    """Where news go. write: takes rows of metrics; text: (step, name, text) for samples.txt; message: a line for the user."""

    write: Callable[[Mapping[str, Any]], None]
    text: Callable[[int, str, str], None]
    message: Callable[[str], None]


class Feed(NamedTuple):
    """hooks: run before the checkpoint of their step is written. evaluate(state) -> the row of a validation.

    first_moves: as `Session.first_moves`, by what the batches are. close: to be called at the end.
    """

    source: Source
    hooks: Sequence[Hook]
    evaluate: Callable[[TrainState], Row]
    first_moves: Mapping[str, int]
    close: Callable[[], None]


def make(setting: Setting, state: TrainState, tell: Tell) -> Feed:
    """The feed of the objective, for a run that goes on from `state`."""
    objective = setting.session.config.train.objective
    feed: Feed = registry.resolve("feed", objective if objective in registry.names("feed") else "shards")(setting, state, tell)
    return feed


def from_shards(setting: Setting, state: TrainState, tell: Tell) -> Feed:
    """Rows of the prepared data, read ahead."""
    del state, tell
    session, prepared, referred = setting.session, setting.prepared, setting.referred

    def arrange(make_batch: MakeBatch) -> MakeBatch:
        return session.plan.arrange(references.joined(referred, "train", make_batch))

    source = loader.make(prepared.batches(session.config, arrange), session.plan.batch_sharding())
    return Feed(source, (), evaluation.make(session, prepared, setting.watchdog, referred), session.first_moves, source.close)
