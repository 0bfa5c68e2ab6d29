"""What a model is fitted on while it is compressed: rows of text as it was trained to read them, or what it writes itself.

An encoder reads masked text, an encoder-decoder inputs with hidden spans and the spans behind them, a model of conversations conversations.
Rows are drawn by the seed, and nothing else is random.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import documents, examples, folder, foreign, prepare, tokenize
from jaxllm.data.examples.contract import row_tokens
from jaxllm.data.shards import Shards
from jaxllm.decode import generate
from jaxllm.ops import sampling
from jaxllm.types import Batch, Model, Params

# Text is read until there is so much more than needed to choose from; and so long a token is, at most, on the average.
CHOICE, TOKEN_CHARACTERS = 4, 8
# Of a batch, at most.
BATCH_TOKENS = 4096
SAMPLES = "samples"

# tell(done, of): rows that are there.
Tell = Callable[[int, int], None]


class Opened(Protocol):
    """A model, as `runs.load` gives it."""

    @property
    def config(self) -> ConfigDict: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def model(self) -> Model: ...

    @property
    def params(self) -> Params: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


class Calibration(NamedTuple):
    """Batches of equal shape, and what they are, in words."""

    batches: Sequence[Batch]
    what: str


def make(run: Opened, source: str, rows: int, tokens: int, seed: int, tell: Tell = lambda done, of: None) -> Calibration:
    """So many rows of so many tokens, or of the context where that is shorter, of `source`: anything that data.source may be, with the
    run's objective, cleaning and tokenizer; a directory of prepared data; or "samples" for what the model writes. The same for the same
    seed.

    A source without the conversations or classes that the model was trained on is read as text, by a model that is no encoder-decoder.
    ValueError for a source that cannot be read, is not for this model or has not enough text, and for samples of one that does not write.
    """
    if rows < 1 or tokens < 2 or not 0 <= seed <= generate.LARGEST_SEED:
        raise ValueError(
            f"--rows {rows} --tokens {tokens} --seed {seed} to calibrate on.\n  Accepted: 1 row or more of 2 tokens or more, and a seed"
            f" of 0 to {generate.LARGEST_SEED}.\n  Change --rows, --tokens or --seed."
        )
    tokens = min(tokens, run.config.model.context_tokens)
    if source == SAMPLES:
        return _samples(run, rows, tokens, seed, tell)
    config = run.config.copy_and_resolve_references()
    config.data.row_tokens, config.data.input_tokens = tokens, 0
    if "splits" in folder.read_record(Path(source).expanduser()):
        return _of_prepared(run, config, Path(source).expanduser(), rows, seed, tell)
    config = _for_source(run, config, source)
    tokenize.check(run.tokenizer, tokenize.needed(config), config)
    with tempfile.TemporaryDirectory() as directory:
        most, place = CHOICE * TOKEN_CHARACTERS * rows * tokens, Path(directory, "rows")
        packed = foreign.pack(config, run.tokenizer, run.classes, source, place, setting="--calibrate", most_characters=most)
        return _drawn(run, config, packed, source, rows, seed, tell)


def _for_source(run: Opened, config: ConfigDict, source: str) -> ConfigDict:
    """The config, or that for text alone where the source holds no more, or nobody knows the names of the classes that it holds."""
    as_text = _for_text(run, config)
    unnamed = examples.make(config).reads in ("label", "labels") and not run.classes
    fits = as_text is config or (_reads(config, source) and not unnamed)
    return config if fits or not _reads(as_text, source) else as_text


def _for_text(run: Opened, config: ConfigDict) -> ConfigDict:
    """The config for text alone, whatever the model was trained on; an encoder-decoder needs what it was trained on."""
    kind = run.model.config.family.kind
    if examples.make(config).reads != "text" and kind != "encoder_decoder":
        config = config.copy_and_resolve_references()
        config.train.objective = "masked_lm" if kind == "encoder" and run.tokenizer.mask_id is not None else "causal_lm"
    return config


def _reads(config: ConfigDict, source: str) -> bool:
    """Whether the source holds what the objective reads."""
    try:
        return next(documents.open(source, config), None) is not None
    except ValueError:
        return False


def _of_prepared(run: Opened, config: ConfigDict, directory: Path, rows: int, seed: int, tell: Tell) -> Calibration:
    prepared = prepare.load(config, directory)
    recipe, found_tokens = prepared.record["recipe"], prepared.train.row_tokens
    readers = {each.train.objective: each for each in (config, _for_text(run, config))}
    fitting = [each for each in readers.values() if _made_alike(recipe, each)]
    is_same = tokenize.fingerprint(prepared.tokenizer) == tokenize.fingerprint(run.tokenizer)
    if not fitting or not is_same or found_tokens != row_tokens(config):
        raise ValueError(
            f"--calibrate {directory} holds rows of {found_tokens} tokens for {recipe.get('rows', 'causal_lm')}, made with"
            f" {'the' if is_same else 'another'} model's tokenizer.\n  Accepted: rows of {row_tokens(config)} tokens for"
            f" {' or '.join(readers)}, made with the model's tokenizer.\n  Change --tokens, prepare data for this model, or give the text."
        )
    return _drawn(run, fitting[0], prepared.train, str(directory), rows, seed, tell)


def _made_alike(recipe: Mapping[str, Any], config: ConfigDict) -> bool:
    """Whether rows of this recipe (data/provenance.py) are stored as the objective of the config reads them."""
    own = {"rows": None} | dict(examples.make(config).recipe)
    return {name: recipe.get(name) for name in own} == own


def _drawn(run: Opened, config: ConfigDict, packed: Shards, source: str, rows: int, seed: int, tell: Tell) -> Calibration:
    """Batches of rows that the seed chooses, each once."""
    tokens, data = packed.row_tokens, examples.make(config)
    # A stream of text ends inside a row, as a rule.
    count = len(packed) - (data.reads == "text" and _is_padded(packed, len(packed) - 1))
    if count < rows:
        raise ValueError(
            f"--calibrate {source} has {count} full rows of {tokens} tokens, and --rows is {rows}.\n"
            f"  Accepted: {f'--rows up to {count}, ' if count else ''}shorter rows, more text.\n"
            "  Give more text, or lower --rows or --tokens."
        )
    chosen = np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))
    made, batches = data.batch(run.tokenizer), list[Batch]()
    for part in _parts(chosen, tokens):
        batches.append({name: jnp.asarray(array) for name, array in made(packed.rows(part), part, seed, 0).items()})
        tell(len(batches) * len(part), rows)
    return Calibration(batches, f"{rows} rows of {tokens} tokens of {source}")


def _is_padded(packed: Shards, row: int) -> bool:
    stored = packed.rows(np.array([row]))
    return any((stored[name] == 0).any() for name in ("segments", "input_segments") if name in stored)


def _samples(run: Opened, rows: int, tokens: int, seed: int, tell: Tell) -> Calibration:
    """Rows that the model writes from nothing, at temperature 1 (Liu et al. 2023, arXiv:2305.17888, section 2.1).

    Unlike there, the first token is drawn as the others are, not evenly from the vocabulary.
    """
    tokenizer = run.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if run.model.decode is None or run.model.encode is not None or first is None:
        what = "its tokenizer has neither BOS nor EOS to begin with" if first is None else f"'{run.model.name}' continues no text"
        raise ValueError(f"--calibrate {SAMPLES}: {what}.\n  Accepted: a gpt or llama whose tokenizer has one; text.\n  Give text.")
    parts, batches = _parts(np.arange(rows), tokens), list[Batch]()
    # Rows of one call differ from each other; calls need seeds of their own.
    seeds = np.random.SeedSequence(seed).generate_state(len(parts))
    for part, own_seed in zip(parts, seeds.tolist(), strict=True):
        # Past the end of a text, too: rows are full.
        texts = generate.generate(
            run.model,
            run.params,
            [[first]] * len(part),
            sampling.Settings(temperature=1.0),
            max_new_tokens=tokens - 1,
            stop_ids=(),
            vocab_size=tokenizer.vocab_size,
            seed=own_seed,
        )
        batches.append({"tokens": jnp.asarray([[first, *text] for text in texts], jnp.int32)})
        tell(len(batches) * len(part), rows)
    return Calibration(batches, f"{rows} rows of {tokens} tokens that the model wrote")


def _parts(rows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Row numbers, cut into batches of equal size where that divides them."""
    most = max(1, BATCH_TOKENS // tokens)
    size = next(size for size in range(min(most, len(rows)), 0, -1) if len(rows) % size == 0)
    return [rows[start : start + size] for start in range(0, len(rows), size)]
