"""Trains a model: prepares the data if need be, resumes if there is a checkpoint, writes a report at the end.

  python -m jaxllm.train --config configs/NAME.py [--config.a.b=value ...] [--workdir DIR] [--dry_run]

The same command again goes on from the last checkpoint.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import command, dry_run
from jaxllm.config import with_classes, with_vocabulary
from jaxllm.data import loader
from jaxllm.data.prepare import Prepared, place, prepare
from jaxllm.decode import samples
from jaxllm.engine import compilation, hooks, trackers
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.environment import Record
from jaxllm.engine.loop import Hook, Monitor, train
from jaxllm.engine.progress import Progress
from jaxllm.engine.record import DamagedError
from jaxllm.engine.session import Session, build_session, check, count
from jaxllm.engine.signals import Interrupts
from jaxllm.engine.state import TrainState, eval_params
from jaxllm.engine.step import Compiled
from jaxllm.engine.workdir import Workdir, check_space, open_workdir, write_json
from jaxllm.evals import baseline, perplexity
from jaxllm.parallel import plan
from jaxllm.report.training import write_report
from jaxllm.transforms import tree


def main(arguments: list[str]) -> int:
    del arguments
    config, path = command.experiment()
    console = Console(soft_wrap=True)
    if flags.FLAGS.dry_run:
        dry_run.show(config, place(config, path), console)
        return 0
    compilation.use_cache()
    with open_workdir(path) as workdir:
        return run(config, workdir, console)


def run(config: ConfigDict, workdir: Workdir, console: Console) -> int:
    """Trains in an open run directory; the exit code: 0, or 128 + the signal that ended the run early."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    checkpoints = Checkpoints(workdir.checkpoints, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best)
    resuming, rows = checkpoints.latest() is not None, _rows(checkpoints, workdir)
    workdir.adopt_config(config, resuming=resuming)
    mesh_plan = plan.make(config)
    check(config, mesh_plan)  # before hours may go into the preparation of data
    prepared = prepare(config, place(config, workdir.path), rows=rows, log=say)
    config = with_classes(with_vocabulary(config, prepared.tokenizer.vocab_size), len(prepared.labels))
    workdir.adopt_config(config, resuming=resuming)
    shutil.copytree(prepared.directory / "tokenizer", workdir.tokenizer, dirs_exist_ok=True)
    write_json(workdir.provenance, prepared.record)

    session = build_session(config, mesh_plan)
    checkpoints.remove_incomplete()
    check_space(workdir.checkpoints, _bytes_to_come(session, checkpoints))
    state = checkpoints.restore(session.abstract).tree if resuming else session.create()
    start = int(state.step)
    if start >= config.train.steps:
        say(f"this run is at step {start} of {config.train.steps} already. Raise train.steps to go on. Writing its report again.")
        say(f"report: {write_report(workdir.path)}")
        return 0
    sampler = samples.make(config, prepared.tokenizer, say)
    begin = f"resuming at step {start}" if resuming else "starting"
    say(f"{begin}: {config.model.name}, {count(session.abstract.params):,} trainable parameters")
    say(f"{session.positions_a_step:,} tokens a step, {config.train.steps:,} steps; compiling ...")
    compiled = session.compile()
    record = Record(workdir.environment, session, compiled, start)
    with Interrupts() as interrupts:
        step, state, reason = _train(session, compiled, state, prepared, sampler, checkpoints, workdir, console, interrupts)
    record.end(step, reason)
    say(f"report: {write_report(workdir.path)}")
    if interrupts.received is not None and step < config.train.steps:
        say(f"{reason} at step {step}: everything is saved. To go on, run the same command again:\n  {_same_command()}")
        return 128 + interrupts.received
    say(f"done. Try: {_next_command(config, workdir)}")
    return 0


def _next_command(config: ConfigDict, workdir: Workdir) -> str:
    """What to do with the trained model."""
    run = f"--run {shlex.quote(str(workdir.path))}"
    if config.model.head != "lm":
        pair = " --pair TEXT" if config.data.pair_field else ""
        return f"python -m jaxllm.evaluate {run}, or\n  python -m jaxllm.classify {run} --text TEXT{pair}"
    if config.train.objective == "masked_lm":
        return f'python -m jaxllm.fill_mask {run} --text "The [MASK]."'
    prompt = config.sample.prompts[0] if config.sample.prompts else ""
    return f"python -m jaxllm.generate {run} --prompt {shlex.quote(prompt)}"


def _bytes_to_come(session: Session, checkpoints: Checkpoints) -> int:
    """Disk that the checkpoints of this run still need: one more than are kept is there while it is written."""
    keep = session.config.checkpoint
    missing = keep.keep_last + keep.keep_best + 1 - len(checkpoints.steps())
    return max(missing, 1) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(session.abstract))


def _rows(checkpoints: Checkpoints, workdir: Workdir) -> str | None:
    """Fingerprint of the rows behind the newest checkpoint. None without one, and with a damaged one, of which restoring it will tell.

    ValueError for a checkpoint of weights alone.
    """
    newest = checkpoints.latest()
    try:
        rows = None if newest is None else checkpoints.record(newest).meta.get("rows")
    except DamagedError:
        return None
    if newest is not None and rows is None:
        raise ValueError(
            f"the run in {workdir.path} was converted from a model of another tool: it has weights, and no training to go on with.\n"
            "  Accepted: a new --workdir, or one of a run that was trained here. Training that begins with such weights is not there yet.\n"
            "  Give another --workdir."
        )
    return rows


def _train(
    session: Session,
    compiled: Compiled,
    state: TrainState,
    prepared: Prepared,
    sampler: samples.Sampler | None,
    checkpoints: Checkpoints,
    workdir: Workdir,
    console: Console,
    interrupts: Interrupts,
) -> tuple[int, TrainState, str]:
    """(updates done, state, why it ended). Everything that needs closing is closed, whatever happens."""
    config, start, total = session.config, int(state.step), session.config.train.steps
    with ExitStack() as stack:
        stack.callback(checkpoints.close)
        progress = stack.enter_context(Progress(total, start, console))
        tracker = trackers.open_all(config, workdir.path, start, progress.message)
        stack.callback(tracker.close)
        source = stack.enter_context(
            loader.make(
                prepared.train,
                session.plan.arrange(prepared.make_batch(config)),
                batch_seqs=config.train.batch_seqs,
                seed=config.seed,
                sharding=session.plan.batch_sharding(),
            )
        )

        def write(row: Mapping[str, Any]) -> None:
            tracker.write(row)
            progress.update(row)

        monitor = Monitor(
            source=source,
            write=write,
            message=progress.message,
            log_every_steps=config.train.log_every_steps,
            max_nonfinite_steps=config.train.max_nonfinite_steps,
            positions_a_step=session.positions_a_step,
            parameter_names=[name for name, _ in tree.named_leaves(session.abstract.params)],
        )
        validation = hooks.Validation(_make_evaluation(session, prepared), write, progress.message)

        def save(step: int, state: TrainState) -> None:
            checkpoints.save(step, state, loss=validation.loss(step), meta={"rows": prepared.train.fingerprint})

        beside = [Hook(validation.run, config.eval.every_steps)]
        if sampler is not None:
            keep = hooks.samples(
                partial(_sample, sampler),
                sampler.prompts,
                lambda step, said: tracker.text(step, "samples", said),
                progress.message,
            )
            beside.append(Hook(keep, config.sample.every_steps))
        beside.append(Hook(save, config.checkpoint.every_steps))
        step, state = train(compiled, state, source, monitor, beside, start=start, total=total, stop=lambda: interrupts.received)
        if step < total:
            save(step, state)
    return step, state, "done" if interrupts.received is None or step == total else interrupts.received.name


def _make_evaluation(session: Session, prepared: Prepared) -> Any:
    """evaluate(state) -> the row of a validation, with what a guess that reads nothing would get."""
    config, shards = session.config, prepared.validation
    measure = perplexity.make_eval(session.model, config, session.region)
    make_batch = prepared.make_batch(config)

    outcomes = config.model.vocab_size if config.model.head == "lm" else config.model.classes
    guess = baseline.measure(prepared.train, shards, make_batch, outcomes, config.eval.max_seqs)

    def evaluate(state: TrainState) -> Mapping[str, Any]:
        batches = loader.sweep(
            shards, session.plan.arrange(make_batch), session.eval_seqs, session.plan.batch_sharding(), config.eval.max_seqs
        )
        row = measure(eval_params(state), batches, shards.bytes_per_token)
        return row | {"baseline_loss": guess.loss, "baseline_accuracy": guess.accuracy}

    return evaluate


def _sample(sampler: samples.Sampler, state: TrainState, step: int) -> list[str]:
    return sampler.generate(eval_params(state), step)


def _same_command() -> str:
    return shlex.join([os.path.basename(sys.executable), "-m", "jaxllm.train", *sys.argv[1:]])


if __name__ == "__main__":
    command.define_flags()
    flags.DEFINE_bool("dry_run", False, "print config, parameter count, bytes, tokens and steps; compile nothing, write nothing")
    command.run(main)
