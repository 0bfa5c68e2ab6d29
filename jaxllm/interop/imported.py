"""A model that another tool wrote, opened but not yet loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from jaxllm.types import Tokenizer


class Tensors(Protocol):
    """Named tensors in files, under the names and in the layout that `transformers` gives them; read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, in the order of the files."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """How it is stored: "float32", "bfloat16", "float16", or the name of another type."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor: float32, bfloat16 or float16, of its shape. ValueError, naming the file, if it cannot be read."""
        ...


@dataclass(frozen=True)
class Imported:
    """What `directory.read` and `gguf.read` return; `weights.load` makes the parameters.

    path: the directory or the file. architecture: name of the class in transformers, such as LlamaForCausalLM.
    config: a whole config whose model section describes this model (vocab_size filled in). tokenizer: None if there is none.
    files: name -> bytes of what travels along unchanged (tokenizer files, generation_config.json, ...).
    notes: lines for the user about what was read in another way than it was written.
    """

    path: Path
    architecture: str
    config: ConfigDict
    tokenizer: Tokenizer | None
    tensors: Tensors
    files: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
