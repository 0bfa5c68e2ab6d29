"""What a model is fitted on while it is compressed: rows of text as it was trained to read them, or what it writes itself."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import examples, foreign
from jaxllm.data.examples.contract import row_tokens
from jaxllm.decode import generate
from jaxllm.ops import sampling
from jaxllm.types import Batch, Model, Params

# Text is read until there is so much more than needed to choose from; and so long a token is, at most, on the average.
CHOICE, TOKEN_CHARACTERS = 4, 8
# Of a batch, at most.
BATCH_TOKENS = 4096
SAMPLES = "samples"


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


def make(run: Opened, source: str, rows: int, tokens: int, seed: int) -> Calibration:
    """So many rows of so many tokens, or of the context where that is shorter, of `source`: anything that data.source may be, with the
    run's objective, cleaning and tokenizer; or "samples" for what the model writes. The same for the same seed.

    ValueError for a source that cannot be read, or has not enough text, and for samples of a model that does not write.
    """
    tokens = min(tokens, run.config.model.context_tokens)
    if source == SAMPLES:
        return _samples(run, rows, tokens, seed)
    config = run.config.copy_and_resolve_references()
    config.data.row_tokens = tokens
    config.data.input_tokens = 0
    with tempfile.TemporaryDirectory() as directory:
        most = CHOICE * TOKEN_CHARACTERS * rows * tokens
        packed = foreign.pack(
            config, run.tokenizer, run.classes, source, Path(directory, "rows"), setting="--calibrate", most_characters=most
        )
        if len(packed) < rows:
            raise ValueError(
                f"--calibrate {source} has {len(packed)} rows of {row_tokens(config)} tokens, and --rows is {rows}.\n"
                f"  Accepted: up to {len(packed)} rows of this text, or fewer tokens a row.\n  Give more text, or lower --rows or --tokens."
            )
        chosen = np.sort(np.random.default_rng(seed).choice(len(packed), rows, replace=False))
        made = examples.make(config).batch(run.tokenizer)
        batches = [
            {name: jnp.asarray(array) for name, array in made(packed.rows(part), part, seed, 0).items()}
            for part in _parts(chosen, tokens)
        ]
    return Calibration(batches, f"{rows} rows of {row_tokens(config)} tokens of {source}")


def _samples(run: Opened, rows: int, tokens: int, seed: int) -> Calibration:
    tokenizer = run.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if run.model.decode is None or run.model.encode is not None or first is None:
        what = "its tokenizer has neither BOS nor EOS to begin with" if first is None else f"'{run.model.name}' continues no text"
        raise ValueError(f"--calibrate {SAMPLES}: {what}.\n  Accepted: a gpt or llama whose tokenizer has one; text.\n  Give text.")
    # Past the end of a text, too: rows are full.
    texts = generate.generate(
        run.model,
        run.params,
        [[first]] * rows,
        sampling.Settings(temperature=1.0),
        max_new_tokens=tokens - 1,
        stop_ids=(),
        vocab_size=tokenizer.vocab_size,
        seed=seed,
    )
    ids = np.array([[first, *text] for text in texts], np.int32)
    batches = [{"tokens": jnp.asarray(ids[part])} for part in _parts(np.arange(rows), tokens)]
    return Calibration(batches, f"{rows} rows of {tokens} tokens that the model wrote")


def _parts(rows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Row numbers, cut into batches of equal size where that divides them."""
    most = max(1, BATCH_TOKENS // tokens)
    size = next(size for size in range(min(most, len(rows)), 0, -1) if len(rows) % size == 0)
    return [rows[start : start + size] for start in range(0, len(rows), size)]
