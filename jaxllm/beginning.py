"""What a run begins with: the state before its first step, or that of its newest checkpoint, what the former says of the data where the
objective asks for it, and the compiled step."""

import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import start, teacher
from jaxllm.consistency import DISTILL, REFERRED
from jaxllm.data.prepare import Prepared
from jaxllm.engine import references
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.references import References, Scorer
from jaxllm.engine.session import Session
from jaxllm.engine.signals import Interrupts
from jaxllm.engine.state import TrainState, full_params
from jaxllm.engine.step import Compiled
from jaxllm.engine.watchdog import Watchdog
from jaxllm.types import Params

Say = Callable[[str], None]


class Beginning:
    """Of one run."""

    @property
    def has_compiled(self) -> bool:
        """Whether `compile` gives a step that is there already."""
        return False

    def create(self, session: Session, say: Say) -> TrainState:
        """The state before the first step: with the weights of the model that the config begins with, else with random ones."""
        return session.create(start.load(session, say) if session.config.train.start else None)

    def restore(self, session: Session, checkpoints: Checkpoints, step: int, say: Say) -> TrainState:
        """The state of the checkpoint of this step."""
        del say
        return checkpoints.restore(session.abstract, step).tree

    def compile(self, session: Session) -> Compiled:
        """The train step."""
        return session.compile()

    def end(self, state: TrainState, interrupts: Interrupts) -> None:
        """Takes the last state of the run, and what signals came until then."""


class SharedBeginning(Beginning):
    """Of runs with one config but for their data, which come one after the other: what is frozen is read, transformed and placed once,
    and the step is compiled once.

    The runs share the seed, and with it their first state. What a run trains of it is copied, which is small beside the rest. The rest
    goes from the last state of a run into the first one of the next, or beside what the checkpoint of the next has.
    stopped: the signal that came so late that the run which ended had nothing more to do.
    """

    def __init__(self, begins: bool) -> None:
        """begins: whether one of the runs has no checkpoint yet, and needs the model itself."""
        self.stopped: signal.Signals | None = None
        self._begins = begins
        # The first state without what is frozen, and that, while no run has it.
        self._first: TrainState | None = None
        self._frozen: Params | None = None
        self._compiled: Compiled | None = None
        # What was said of the first state when it was read.
        self._remark = ""

    @property
    def has_compiled(self) -> bool:
        return self._compiled is not None

    def create(self, session: Session, say: Say) -> TrainState:
        if self._first is None:
            self._read(session)
            say(self._remark)
        else:
            say(f"{self._remark} (in memory already)")
        return dataclasses.replace(jax.tree.map(jnp.copy, self._first), frozen=self._frozen)

    def restore(self, session: Session, checkpoints: Checkpoints, step: int, say: Say) -> TrainState:
        if self._frozen is None and self._begins:
            self._read(session)
            say(f"reads {session.config.train.start}, with which a later run begins; this one goes on beside its frozen parameters")
        if self._frozen is None:
            return super().restore(session, checkpoints, step, say)
        restored: Any = checkpoints.restore(_without_frozen(session.abstract), step, frozen=self._frozen).tree
        return dataclasses.replace(restored, frozen=self._frozen)

    def compile(self, session: Session) -> Compiled:
        if self._compiled is None:
            self._compiled = super().compile(session)
        return self._compiled

    def end(self, state: TrainState, interrupts: Interrupts) -> None:
        self._frozen, self.stopped = state.frozen, interrupts.settle()

    def _read(self, session: Session) -> None:
        said: list[str] = []
        state = super().create(session, said.append)
        self._remark = " ".join(said)
        self._first, self._frozen = _without_frozen(state), state.frozen


def _without_frozen(state: TrainState) -> TrainState:
    nothing: Any = None
    return dataclasses.replace(state, frozen=nothing)


def ask_teacher(session: Session, prepared: Prepared, watchdog: Watchdog, say: Say) -> References | None:
    """What the teacher says of the targets, where there is one. It is in memory meanwhile, and need not share that with a state."""
    if session.config.train.objective != DISTILL:
        return None
    watchdog.beside("scoring with the teacher", 0)
    scorer, params = teacher.load(session, prepared.tokenizer, say)
    return references.make(scorer, prepared, params, watchdog, say)


def refer(session: Session, prepared: Prepared, first: TrainState, watchdog: Watchdog, say: Say) -> References | None:
    """What the first state says of the targets, where the objective needs it."""
    if session.config.train.objective not in REFERRED:
        return None
    watchdog.beside("scoring with the reference", 0)
    title = "the model that training begins with"
    scorer = Scorer(session.model, session.config, session.plan, session.region, session.eval_seqs, title, "train.start")
    return references.make(scorer, prepared, full_params(first), watchdog, say)


def refer_again(
    session: Session, prepared: Prepared, checkpoints: Checkpoints, step: int, watchdog: Watchdog, say: Say
) -> References | None:
    """The same for a run that goes on from a checkpoint: what it began with, made again if the files are not there as they were.

    ValueError if the first state or the teacher is no longer what it was.
    """
    if not references.needed(session.config):
        return None
    key = str(checkpoints.record(step).meta[references.NAME])
    if references.are_there(prepared, key):
        return references.read(prepared, key)
    taught = session.config.train.objective == DISTILL
    source = "by the teacher" if taught else "from the first state"
    say(f"the reference log-probabilities in '{prepared.directory}' are not there as they were: they are made {source}")
    if taught:
        made = ask_teacher(session, prepared, watchdog, say)
    else:
        made = refer(session, prepared, Beginning().create(session, say), watchdog, say)
    if made is not None and made.key != key:
        field, path = ("distill.teacher", session.config.distill.teacher) if taught else ("train.start", session.config.train.start)
        raise ValueError(
            f"the model that this run began with is no longer the one in {field} = '{path}', or is computed"
            f" otherwise: its reference has the key {made.key}.\n  Accepted: {key}. Put back what {field} was, or"
            f" '{prepared.directory / references.FOLDER / key}', or begin a new run in another --workdir."
        )
    return made
