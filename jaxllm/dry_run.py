"""What a training run would be, from the config alone: nothing is compiled, allocated or written, and no device is needed."""

from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console, Group
from rich.table import Table

from jaxllm import config as schema
from jaxllm.data import folder, tokenize
from jaxllm.engine.session import UNKNOWN_CLASSES, Session, build_session, bytes_by_category, bytes_of, count
from jaxllm.parallel import activations, forms, layout, pipeline, plan, report, traffic
from jaxllm.pipeline.simulate import simulate
from jaxllm.transforms import tree

# Characters in ordinary Western text, for a tokenizer that does not exist before the data is read.
ASSUMED_CHARACTERS = 128


def show(config: ConfigDict, data: Path, console: Console) -> None:
    """Prints the resolved config, tokens and steps, and the sharding report: where parameters lie, bytes, traffic."""
    vocabulary = ""
    if not config.model.vocab_size:
        size, vocabulary = expected_vocabulary(config, data)
        config = schema.with_vocabulary(config, size)
    config = schema.with_classes(config, config.model.classes or len(folder.read_record(data).get("labels", ())) or UNKNOWN_CLASSES)
    session = build_session(config, plan.make_abstract(config))
    console.print(schema.to_json(config), end="", markup=False)
    console.print(_facts(session, vocabulary))
    for note in session.notes():
        console.print(f"warning: {note}", markup=False)
    console.print(sharding(session))


def expected_vocabulary(config: ConfigDict, data: Path) -> tuple[int, str]:
    """(size, where it comes from) of the vocabulary that preparing the data would give."""
    record = folder.read_record(data)
    if "tokenizer" in record:
        return record["tokenizer"]["vocab_size"], f"of the data prepared in {data}"
    kind, added = config.tokenizer.kind, tokenize.needed(config)
    if kind in ("bpe", "unigram"):
        more = added.mask + added.sentinels
        return config.tokenizer.vocab_size + more, "tokenizer.vocab_size" + (f" + {more} special" if more else "")
    if kind == "char":
        return ASSUMED_CHARACTERS, "assumed: counted when the data is prepared"
    return tokenize.make(config, lambda: ()).vocab_size, f"of the tokenizer '{kind}'"


def _facts(session: Session, vocabulary: str) -> Table:
    config, train = session.config, session.config.train
    mesh = " x ".join(f"{name} {size}" for name, size in session.plan.mesh.shape.items() if size > 1) or "one device"
    table = Table("run", "", show_header=False, title="What would run", title_justify="left")
    rows = {
        "architecture": config.model.name,
        "parameters": f"{session.weights:,}",
        "trainable": _trainable(session),
        "vocabulary": f"{config.model.vocab_size:,}" + (f" ({vocabulary})" if vocabulary else ""),
        "mesh": mesh,
        "steps": f"{train.steps:,}",
        "tokens a step": f"{session.positions_a_step:,} ({train.batch_seqs:,} rows of {session.positions_a_step // train.batch_seqs:,})",
        "tokens in all": f"{train.steps * session.positions_a_step:,}",
        "tokens a parameter": f"{train.steps * session.positions_a_step / count(session.abstract.params):.1f}",
    }
    if session.plan.mesh.shape["pipe"] > 1:
        rows["pipeline"] = _pipeline(session)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _trainable(session: Session) -> str:
    trained, weights = count(session.abstract.params), session.weights
    return f"{trained:,}" + (f" ({trained / weights:.3%})" if trained < weights else "")


def _pipeline(session: Session) -> str:
    made = pipeline.timetable(session.model, session.config, session.plan)
    found = simulate(made)
    return (
        f"{made.name}, {made.stages} stages, {made.microbatches} micro-batches in {found.ticks:,} ticks; idle {float(found.bubble):.1%},"
        f" inputs of {max(found.live)} held"
    )


def sharding(session: Session) -> Group:
    """Where the parameters lie, what a device holds of the training state, and what a step moves between devices."""
    made, abstract, axes = session.plan, session.abstract, session.model.axes
    everything = tree.combine(abstract.params, abstract.frozen)
    tables = [report.parameters(layout.entries(made, axes, everything), made.mesh.shape)]
    if count(abstract.frozen):
        tables.append(report.forms(forms.of(everything, tree.names(abstract.params))))
    state_bytes = bytes_of(abstract.opt_state)
    uncut = {"parameters": layout.uncut(made, everything), "optimizer": layout.uncut(made, abstract.opt_state)}
    textbook = layout.textbook(made, count(abstract.params), state_bytes, bytes_of(abstract.frozen))
    tables.append(report.memory(bytes_by_category(session), textbook, uncut))
    if made.mesh.size > 1:
        tables.append(report.traffic(*moved(session)))
    return report.group(*tables)


def moved(session: Session, adds_first: bool = True) -> tuple[list[traffic.Row], str]:
    """What a step moves, as far as it can be said, and a line that says what cannot; adds_first: see parallel/activations.py."""
    made, model, config, abstract = session.plan, session.model, session.config, session.abstract
    # The backward pass ends above frozen layers, and does not gather them again.
    whole = not config.train.frozen_layers
    parameters = traffic.predict(made, model, abstract.params, abstract.frozen, config.train.microbatches) if whole else None
    found = {
        "parameters and gradients": parameters if made.mesh.size > 1 else [],
        "activations over tensor": activations.over_tensor(made, model, config, session.row_tokens, adds_first),
        "activations over pipe": activations.over_pipe(made, model, config, session.row_tokens),
        "activations over seq": None if made.mesh.shape["seq"] > 1 else [],
    }
    unknown = [what for what, rows in found.items() if rows is None]
    note = f"Not predicted: {', '.join(unknown)}." if unknown else ""
    return [row for rows in found.values() for row in rows or ()], note
