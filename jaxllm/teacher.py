"""The model that a student learns from: `distill.teacher` is what `train.start` may be, a run, a directory of transformers or a GGUF file.

It may have another architecture than the student, and reads the same ids: a student that begins with random parameters gets its tokenizer.
It is computed as the student is (precision.compute, the mesh), and its matrices are kept as precision.frozen says, or in their codes.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm import runs, start
from jaxllm.consistency import DISTILL, FORMS, MODELS
from jaxllm.data import tokenize
from jaxllm.data.examples import row_tokens
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.references import Scorer
from jaxllm.engine.session import Session, build_session
from jaxllm.engine.workdir import Workdir
from jaxllm.start import Start
from jaxllm.types import Params, Tokenizer

SETTING = "distill.teacher"
# All that is trained of a model of which nothing is: the rest is then kept as frozen parameters are.
TRAINABLE = "norm/.*"


def resolve(config: ConfigDict, workdir: Path, asked: Collection[str] = ()) -> ConfigDict:
    """A copy with the tokenizer of the teacher, if there is one and the student has none yet; else the same config.

    A run in `workdir` that has begun has what it needs: the teacher need not be there any more. asked: see `start.resolve`.
    """
    if config.train.objective != DISTILL or config.train.start or not config.distill.teacher:
        return config
    begun, fields = Workdir(workdir), None
    if Checkpoints(begun.checkpoints).steps() and begun.config.is_file():
        stored = schema.load(begun.config)
        if stored.distill.teacher == config.distill.teacher:
            fields = stored.tokenizer.kind, stored.tokenizer.path
    fields = fields or start.open_start(config.distill.teacher).tokenizer_fields
    return start.with_tokenizer(config.copy_and_resolve_references(), fields, asked, SETTING)


def load(session: Session, tokenizer: Tokenizer, say: Callable[[str], None]) -> tuple[Scorer, Params]:
    """What scores rows as the teacher does, and its parameters, on the mesh of the session of the student.

    tokenizer: the student's. ValueError if the teacher has another one, or cannot read the rows.
    """
    config = session.config
    found = start.open_start(config.distill.teacher, FORMS)
    own = _config(config, found)
    vocabulary = min(config.model.vocab_size, own.model.vocab_size)
    _check(config, found, tokenizer, vocabulary)
    teaching = build_session(own, session.plan)
    params = start.load(teaching, lambda line: say(f"teacher: {line}"))
    title = f"the teacher '{config.distill.teacher}'"
    scorer = Scorer(teaching.model, own, session.plan, teaching.region, session.eval_seqs, title, SETTING, vocabulary)
    return scorer, params


def _config(config: ConfigDict, teacher: Start) -> ConfigDict:
    """That of the student, with the teacher in its place."""
    own = config.copy_and_resolve_references()
    base, free = schema.base(), {name: config.model[name] for name in start.FREE}
    for section in ("model", "quant", "lora"):
        own[section].update(base[section])
    own.model.update(free | {"dropout_frac": 0.0})
    own.data.row_tokens = row_tokens(config)
    own.train.update({"start": config.distill.teacher, "transforms": (), "trainable": TRAINABLE, "frozen_layers": 0})
    own = start.with_architecture(own, teacher.config.model, teacher.config.model.vocab_size, config.distill.teacher, ())
    return schema.with_vocabulary(start.with_codes(own, teacher.config), 0)


def _check(config: ConfigDict, teacher: Start, tokenizer: Tokenizer, vocabulary: int) -> None:
    given, model, top_k = f"{SETTING} = '{config.distill.teacher}'", teacher.config.model, config.distill.top_k
    if model.name not in MODELS[DISTILL] or model.head != "lm":
        raise ValueError(
            f"{given} is of model.name = '{model.name}' with model.head = '{model.head}', which does not predict the next token.\n"
            f"  Accepted: {' or '.join(MODELS[DISTILL])} with the head lm.\n  Set another {SETTING}."
        )
    if teacher.tokenizer is None:
        raise ValueError(runs.no_tokenizer(teacher.path))
    size, others = tokenizer.vocab_size, teacher.tokenizer.vocab_size
    told = [tokenize.table_fingerprint(each, min(size, others)) for each in (tokenizer, teacher.tokenizer)]
    if size > others or told[0] != told[1]:
        different = f"its tokens have the fingerprint {told[1][:16]}" if told[0] != told[1] else f"it has {others:,} tokens"
        raise ValueError(
            f"{given} has another tokenizer than the student, whose ids would mean other tokens to it: {different}.\n"
            f"  Accepted: a teacher whose first {size:,} tokens are those of the student, with the fingerprint {told[0][:16]}.\n"
            f"  Set tokenizer.kind and tokenizer.path to the teacher's (without train.start, leave both out), or another {SETTING}."
        )
    if row_tokens(config) > model.context_tokens:
        raise ValueError(
            f"{given} reads {model.context_tokens} tokens, and rows have {row_tokens(config)}.\n"
            f"  Accepted: up to {model.context_tokens}.\n  Set data.row_tokens={model.context_tokens}, or another {SETTING}."
        )
    most = vocabulary if model.vocab_size == config.model.vocab_size else vocabulary - 1
    if top_k > most:
        raise ValueError(
            f"distill.top_k = {top_k} of a vocabulary of {vocabulary} tokens.\n  Accepted: up to {most}.\n  Set distill.top_k."
        )
