"""The tokenizer in the directory of an adapter: the files that are written for it, and what becomes of those that are found.

PEFT does not read them; who trains with new tokens or a chat template saves the tokenizer there, where transformers opens it.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxllm.data import tokenize
from jaxllm.data.tokenizers import file as tokenizer_file
from jaxllm.interop import directory as hf
from jaxllm.interop.tokenizer_files import Made
from jaxllm.models.architecture import Architecture


def make(tokenizer: Any, base: Any | None, arch: Architecture) -> Made:
    """The files, none for the tokenizer that the base has (None: not known) where that has no chat template."""
    same = base is not None and tokenize.fingerprint(base) == tokenize.fingerprint(tokenizer)
    return Made({}) if same and tokenizer.template is None else hf.tokenizer_alone(tokenizer, arch)


def choose(directory: Path, config: ConfigDict, base: Any) -> Any:
    """The tokenizer in the directory, or without one that of the base; fills in the config's tokenizer section.

    What ends a text for the base still does: it may be said in a file that an adapter has no reason to repeat. ValueError for a tokenizer
    with more tokens than the embedding has rows.
    """
    if not tokenizer_file.has_one(directory):
        return base
    config.tokenizer.kind, config.tokenizer.path = "file", str(directory.absolute())
    tokenizer: Any = tokenizer_file.load(config, lambda: ())
    hf.check_vocabulary(directory, tokenizer, config.model.vocab_size)
    return tokenize.with_stops(
        tokenizer, [index for index in tokenize.stop_ids(base) if _token(tokenizer, index) == _token(base, index)]
    )


def _token(tokenizer: Any, index: int) -> str | None:
    """How the token is written, special or not; None if there is none."""
    added = {number: name for name, number in tokenizer.added_tokens.items()}
    return added.get(index) or (tokenizer.decode([index]) if index < tokenizer.vocab_size else None)


def files(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer in the directory, name -> bytes."""
    return {name: (directory / name).read_bytes() for name in hf.CARRIED if (directory / name).is_file()}
