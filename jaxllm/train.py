"""Trains a model: prepares the data if need be, resumes if there is a checkpoint, writes a report at the end.

  python -m jaxllm.train --config configs/NAME.py [--config.a.b=value ...] [--workdir DIR] [--dry_run]

The same command again goes on from the last checkpoint. On several hosts the same command runs on each, and the environment says
which is which (parallel/environments.py, launch/README.md): the first process writes all files, which must lie on a shared disk.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import beginning as beginnings
from jaxllm import command, dry_run
from jaxllm.beginning import Beginning
from jaxllm.config import flatten, with_classes, with_vocabulary
from jaxllm.consistency import ANSWERING, rows_of
from jaxllm.data import mixture
from jaxllm.data.prepare import Prepared, place, prepare
from jaxllm.decode import samples
from jaxllm.engine import compilation, hang, hooks, references, trackers
from jaxllm.engine import feed as feeds
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.environment import Record
from jaxllm.engine.loop import Hook, Monitor, train
from jaxllm.engine.progress import Progress
from jaxllm.engine.record import DamagedError
from jaxllm.engine.session import Session, build_session, bytes_of, check
from jaxllm.engine.signals import Interrupts
from jaxllm.engine.state import TrainState, eval_params
from jaxllm.engine.step import Compiled
from jaxllm.engine.trackers import jsonl
from jaxllm.engine.watchdog import Watchdog
from jaxllm.engine.workdir import Workdir, check_space, open_workdir, write_json
from jaxllm.parallel import distributed, plan, processes
from jaxllm.report import runs
from jaxllm.report.summary import describe_change
from jaxllm.report.training import write_report
from jaxllm.transforms import tree

# How long a save in progress may still take when the run hangs.
SETTLE_SECS = 5.0


def main(arguments: list[str]) -> int:
    del arguments
    config, path = command.experiment()
    console = Console(soft_wrap=True)
    if flags.FLAGS.dry_run:
        dry_run.show(config, place(config, path), console)
        return 0
    with started() as console:
        check_here(config)
        with open_run(path) as workdir:
            return run(config, workdir, console)


@contextmanager
def started() -> Iterator[Console]:
    """Joins the processes of the run, and gives what it is printed on: of the first process alone. Explains errors."""
    console = Console(soft_wrap=True)
    compilation.use_cache()
    with distributed.started(partial(_say, console)), command.Explained():
        yield console if processes.is_first() else Console(quiet=True, force_terminal=False)


def check_here(config: ConfigDict) -> None:
    """ValueError for what cannot run here, before a directory is made."""
    fields = {key: repr(value) for key, value in flatten(config).items()}
    processes.check_same(fields, "the config", "Start all processes with the same command.")
    mesh_plan = plan.make(config)
    processes.check_reach(mesh_plan.mesh.devices)
    check(config, mesh_plan)


class Ready(NamedTuple):
    """A run whose data is there. config: with what the data decides; newest: the checkpoint that it goes on from, if there is one."""

    config: ConfigDict
    plan: plan.Plan
    prepared: Prepared
    checkpoints: Checkpoints
    newest: int | None


def get_ready(config: ConfigDict, workdir: Workdir, say: Callable[[str], None]) -> Ready:
    """Prepares the data of the run in an open run directory. ValueError for what cannot be trained, or not be continued like this."""
    checkpoints = Checkpoints(workdir.checkpoints, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best)
    newest = _newest(checkpoints)
    rows = _rows(checkpoints, newest, workdir)
    workdir.adopt_config(config, newest)
    mesh_plan = plan.make(config)
    check(config, mesh_plan)  # before hours may go into the preparation of data
    prepared = _prepare(config, workdir, rows, say)
    config = with_classes(with_vocabulary(config, prepared.tokenizer.vocab_size), len(prepared.labels))
    workdir.adopt_config(config, newest)
    return Ready(config, mesh_plan, prepared, checkpoints, newest)


def run(config: ConfigDict, workdir: Workdir, console: Console, beginning: Beginning | None = None) -> int:
    """Trains in an open run directory; the exit code: 0, or 128 + the signal that ended the run early.

    beginning: one that is shared with other runs. A run that hangs ends the process with `watchdog.HANG`.
    """
    limits = {"step_secs": config.watchdog.step_secs, "beside_secs": config.watchdog.beside_secs}
    with Watchdog(workdir.hosts, **limits, process=jax.process_index(), processes=jax.process_count()) as watchdog:
        return _run(config, workdir, console, watchdog, beginning or Beginning())


def _run(config: ConfigDict, workdir: Workdir, console: Console, watchdog: Watchdog, beginning: Beginning) -> int:
    say = partial(_say, console)
    config, mesh_plan, prepared, checkpoints, newest = get_ready(config, workdir, say)
    begin = newest or 0
    if begin >= config.train.steps:
        beyond = f"this run is at step {begin}, beyond train.steps = {config.train.steps}"
        where = f"this run is at step {begin} of {begin} already" if begin == config.train.steps else beyond
        say(f"{where}: nothing is left to train. Raise train.steps to go on. Writing its report again.")
        _report(workdir, say)
        return 0
    session = build_session(config, mesh_plan)
    for note in session.notes() + prepared.notes(config):
        say(f"warning: {note}")
    compilation.distrust_cache(mesh_plan.mesh.devices.flat[0].platform, mesh_plan.mesh.size)
    if processes.is_first():
        shutil.copytree(prepared.directory / "tokenizer", workdir.tokenizer, dirs_exist_ok=True)
        write_json(workdir.provenance, prepared.record)
        checkpoints.remove_incomplete()
        check_space(workdir.checkpoints, _bytes_to_come(session, checkpoints))
    watchdog.beside("restoring or creating the state", 0)
    if newest is None:
        referred = beginnings.ask_teacher(session, prepared, watchdog, say)
        state = beginning.create(session, say)
        referred = referred or beginnings.refer(session, prepared, state, watchdog, say)
    else:
        referred = beginnings.refer_again(session, prepared, checkpoints, newest, watchdog, say)
        state = beginning.restore(session, checkpoints, newest, say)
    sampler = samples.make(config, prepared.tokenizer, say)
    say(f"{'starting' if newest is None else f'resuming at step {begin}'}: {session.describe()}")
    if prepared.replay is not None:
        say(mixture.describe(config, prepared.train, prepared.replay))
    steps = f"{f'{config.train.steps - begin:,} of ' if begin else ''}{config.train.steps:,} steps"
    step_is = "as compiled before" if beginning.has_compiled else "compiling ..."
    say(f"{session.positions_a_step:,} tokens a step, {steps}; {step_is}")
    watchdog.beside("compiling", begin)
    compiled = beginning.compile(session)
    watchdog.collectives = hang.list_collectives(compiled.executable.as_text(), mesh_plan.mesh) if mesh_plan.mesh.size > 1 else []
    record = Record(workdir.environment, session, compiled, begin)
    watchdog.at_hang(lambda done: _end_at_hang(checkpoints, record, done))
    with Interrupts() as interrupts:
        first = partial(beginning.create, session, lambda line: None)
        setting = feeds.Setting(session, prepared, referred, workdir.path, watchdog, begin, first, checkpoints.steps)
        step, state, reason = _train(setting, compiled, state, sampler, checkpoints, console, interrupts)
    watchdog.beside("writing the report", step)
    record.end(step, reason)
    _report(workdir, say)
    if interrupts.decided is not None and step < config.train.steps:
        say(f"{reason} at step {step}: everything is saved. To go on, run the same command again:\n  {same_command()}")
        return 128 + interrupts.decided
    say(f"done. Try: {_next_command(config, workdir)}")
    beginning.end(state, interrupts)
    return 0


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False)


def open_run(path: Path) -> Workdir:
    """The run directory, which the first process locks; ValueError on one that does not share it."""
    workdir = open_workdir(path) if processes.is_first() else Workdir(path)
    processes.check_shared(workdir.lock, "--workdir")
    return workdir


def _report(workdir: Workdir, say: Callable[[str], None]) -> None:
    """Writes the report, on the first process; the others need not wait for it."""
    if processes.is_first():
        say(f"report: {write_report(workdir.path)}")
        if line := describe_change(runs.read(workdir.path)):
            say(line)


def _newest(checkpoints: Checkpoints) -> int | None:
    """The newest step, as the first process sees it: another host may see a directory as it was some seconds ago."""
    latest = checkpoints.latest()
    step = processes.from_first(-1 if latest is None else latest)
    return None if step < 0 else step


def _prepare(config: ConfigDict, workdir: Workdir, rows: str | None, say: Callable[[str], None]) -> Prepared:
    """The data, made by the first process while the others wait; they then find it, or make their own where data.dir is not shared.

    ValueError on a process whose data is not that of the first one.
    """
    make = partial(prepare, config, place(config, workdir.path), rows=rows, log=say)
    made = make() if processes.is_first() else None
    processes.wait("data prepared")
    prepared = made or make()
    processes.check_same(
        {
            "training rows": prepared.fingerprint,
            **{f"{name} rows": split.fingerprint for name, split in prepared.splits.items() if "validation" in name},
            "tokenizer": prepared.record["tokenizer"]["fingerprint"],
        },
        f"the prepared data in '{prepared.directory}'",
        "Use a data.dir that all hosts share, or the same source and the same versions on each.",
    )
    return prepared


def _next_command(config: ConfigDict, workdir: Workdir) -> str:
    """What to do with the trained model."""
    run = f"--run {shlex.quote(str(workdir.path))}"
    if config.train.objective == "reward":
        return (
            f"python -m jaxllm.evaluate {run}, or\n  python -m jaxllm.reward {run} --prompt PROMPT --answer ANSWER --answer OTHER"
        )
    if config.model.head != "lm":
        pair = " --pair TEXT" if config.data.pair_field else ""
        return f"python -m jaxllm.evaluate {run}, or\n  python -m jaxllm.classify {run} --text TEXT{pair}"
    if config.train.objective == "masked_lm":
        return f'python -m jaxllm.fill_mask {run} --text "The [MASK]."'
    if rows_of(config) in ANSWERING:
        return f"python -m jaxllm.generate --chat {run}"
    prompt = config.sample.prompts[0] if config.sample.prompts else ""
    return f"python -m jaxllm.generate {run} --prompt {shlex.quote(prompt)}"


def _bytes_to_come(session: Session, checkpoints: Checkpoints) -> int:
    """Disk that the checkpoints of this run still need: one more than are kept is there while it is written. What is frozen is
    written once."""
    keep = session.config.checkpoint
    missing = keep.keep_last + keep.keep_best + 1 - len(checkpoints.steps())
    frozen_bytes = bytes_of(session.abstract.frozen)
    step_bytes = bytes_of(session.abstract) - frozen_bytes
    return max(missing, 1) * step_bytes + (0 if checkpoints.has_frozen() else frozen_bytes)


def _rows(checkpoints: Checkpoints, newest: int | None, workdir: Workdir) -> str | None:
    """Fingerprint of the rows behind the newest checkpoint. None without one, and with a damaged one, of which restoring it will tell.

    ValueError for a checkpoint of weights alone.
    """
    try:
        rows = None if newest is None else checkpoints.record(newest).meta.get("rows")
    except DamagedError:
        return None
    if newest is not None and rows is None:
        raise ValueError(
            f"the run in {workdir.path} was converted from a model of another tool: it has weights, and no training to go on with.\n"
            "  Accepted: another --workdir; training there can begin with these weights.\n"
            f"  Set train.start={workdir.path}, and give another --workdir."
        )
    return rows


def _train(
    setting: feeds.Setting,
    compiled: Compiled,
    state: TrainState,
    sampler: samples.Sampler | None,
    checkpoints: Checkpoints,
    console: Console,
    interrupts: Interrupts,
) -> tuple[int, TrainState, str]:
    """(updates done, state, why it ended). Everything that needs closing is closed, whatever happens."""
    session, prepared, referred, directory, watchdog, start = setting[:6]
    config, total = session.config, session.config.train.steps
    with ExitStack() as stack:
        stack.callback(checkpoints.close)
        progress = stack.enter_context(Progress(total, start, console))
        tracker = trackers.open_all(config, directory, start, progress.message) if processes.is_first() else trackers.Trackers()
        stack.callback(tracker.close)

        def write(row: Mapping[str, Any]) -> None:
            tracker.write(row)
            progress.update(row)
            if news := watchdog.news():
                progress.message(news)

        feed = feeds.make(setting, state, feeds.Tell(write, tracker.text, progress.message))
        stack.callback(feed.close)
        monitor = Monitor(
            source=feed.source,
            write=write,
            message=progress.message,
            log_every_steps=config.train.log_every_steps,
            max_nonfinite_steps=config.train.max_nonfinite_steps,
            positions_a_step=session.positions_a_step,
            parameter_names=[name for name, _ in tree.named_leaves(session.abstract.params)],
            first_moves=feed.first_moves,
            tell=watchdog.step,
        )
        before = jsonl.find(directory, "eval", 0) if start else None
        validation = hooks.Validation(feed.evaluate, write, progress.message, before)
        if start == 0 and (config.train.start or prepared.replay is not None or referred is not None):
            # What is known before is what can be forgotten.
            watchdog.around("validation", validation.run)(0, state)

        def save(step: int, state: TrainState) -> None:
            watchdog.beside("saving a checkpoint", step)
            meta = {"rows": prepared.fingerprint} | ({} if referred is None else {references.NAME: referred.key})
            checkpoints.save(step, state, loss=validation.loss(step), meta=meta)

        beside = [Hook(watchdog.around("validation", validation.run), config.eval.every_steps)]
        if sampler is not None:
            keep = hooks.samples(
                partial(_sample, sampler),
                sampler.prompts,
                lambda step, said: tracker.text(step, "samples", said),
                progress.message,
            )
            beside.append(Hook(watchdog.around("samples", keep), config.sample.every_steps))
        beside += feed.hooks
        beside.append(Hook(save, config.checkpoint.every_steps))
        step, state = train(compiled, state, feed.source, monitor, beside, start=start, total=total, stop=interrupts.agreed)
        if step < total:
            save(step, state)
        watchdog.beside("finishing the checkpoint and the trackers", step)
    return step, state, "done" if interrupts.decided is None or step == total else interrupts.decided.name


def _sample(sampler: samples.Sampler, state: TrainState, step: int) -> list[str]:
    return sampler.generate(eval_params(state), step)


def _end_at_hang(checkpoints: Checkpoints, record: Record, done: int) -> str:
    """A line about where the same command would go on; called by the watchdog while the main thread hangs."""
    saved, newest = checkpoints.settle(SETTLE_SECS), checkpoints.latest()
    if jax.process_index() == 0:
        record.end(done, "hang")
    lost = "" if saved else " One more was being written, and is lost."
    if newest is None:
        return f"there is no checkpoint yet.{lost} The same command begins again."
    return f"the newest checkpoint is that of step {newest}.{lost} The same command goes on from there."


def same_command() -> str:
    """The command that this process was started with."""
    return shlex.join([os.path.basename(sys.executable), "-m", f"jaxllm.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


if __name__ == "__main__":
    command.define_flags()
    flags.DEFINE_bool("dry_run", False, "print config, parameter count, bytes, tokens and steps; compile nothing, write nothing")
    command.run(main)
