"""What a training run would be, from the config alone: nothing is compiled, allocated or written, and no device is needed."""

from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console, Group
from rich.table import Table

from jaxllm import config as schema
from jaxllm.data import folder, tokenize
from jaxllm.engine.session import UNKNOWN_CLASSES, Session, build_session, bytes_by_category, count
from jaxllm.parallel import activations, layout, plan, report, traffic
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
        "parameters": f"{count(session.abstract.params) + count(session.abstract.frozen):,}",
        "trainable": f"{count(session.abstract.params):,}",
        "vocabulary": f"{config.model.vocab_size:,}" + (f" ({vocabulary})" if vocabulary else ""),
        "mesh": mesh,
        "steps": f"{train.steps:,}",
        "tokens a step": f"{session.positions_a_step:,} ({train.batch_seqs:,} rows of {session.positions_a_step // train.batch_seqs:,})",
        "tokens in all": f"{train.steps * session.positions_a_step:,}",
        "tokens a parameter": f"{train.steps * session.positions_a_step / count(session.abstract.params):.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def sharding(session: Session) -> Group:
    """Where the parameters lie, what a device holds of the training state, and what a step moves between devices."""
    made, abstract, axes = session.plan, session.abstract, session.model.axes
    everything = tree.combine(abstract.params, abstract.frozen)
    tables = [report.parameters(layout.entries(made, axes, everything), made.mesh.shape)]
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.opt_state))
    uncut = {"parameters": layout.uncut(made, everything), "optimizer": layout.uncut(made, abstract.opt_state)}
    textbook = layout.textbook(made, count(abstract.params), state_bytes)
    tables.append(report.memory(bytes_by_category(session), textbook, uncut))
    if made.mesh.size > 1:
        rows = traffic.predict(made, session.model, abstract.params, abstract.frozen, session.config.train.microbatches)
        within = activations.predict(made, session.model, session.config, session.row_tokens)
        tables.append(report.traffic([*rows, *(within or ())], _unknown(session, within)))
    return report.group(*tables)


def _unknown(session: Session, within: object) -> str:
    """Over which axes activations travel in a way that is not predicted."""
    shape = session.plan.mesh.shape
    axes = [axis for axis in ("pipe", "seq", "tensor") if shape[axis] > 1 and (axis != "tensor" or within is None)]
    return f"Not predicted: what activations move over {', '.join(axes)}." if axes else ""
