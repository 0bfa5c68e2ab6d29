"""The tensors of a quantized directory as those of a dense one: each Linear has its `weight` again, made when it is read."""

from collections.abc import Callable, Mapping

import numpy as np

from jaxllm.interop.packed.codes import Codes, NormalFloat
from jaxllm.interop.packed.formats import Found
from jaxllm.interop.packed.settings import Settings
from jaxllm.interop.safetensors import Files


class Dense:
    """See imported.Tensors.

    inputs_first: whether a weight, by its name, is stored [inputs, outputs] where it is dense; quantized, all are [outputs, inputs].
    """

    def __init__(self, files: Files, found: Found, inputs_first: Callable[[str], bool]) -> None:
        self._files, self._found, self._inputs_first = files, found, inputs_first
        marks = tuple(f".{mark}" for mark in found.format.MARKS)
        linears = {name.removesuffix(mark): None for name in files.shapes for mark in marks if name.endswith(mark)}
        if not linears:
            raise ValueError(
                f"the quantization_config says {found.format.METHOD}, and no tensor is named {' or '.join(f'*{mark}' for mark in marks)}.\n"
                "  Accepted: config and tensors of one model.\n  Fetch them again; if the tensors are dense, take it out."
            )
        # The weight -> the parts that there are of it, by the names behind that of the Linear.
        self._parts = {
            f"{linear}.weight": {part: f"{linear}.{part}" for part in found.format.PARTS if f"{linear}.{part}" in files.shapes}
            for linear in linears
        }
        weights = {stored: weight for weight, parts in self._parts.items() for stored in parts.values()}
        names = dict.fromkeys(weights.get(name, name) for name in files.shapes)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: self._shape(name) for name in names}
        self.dtypes: Mapping[str, str] = {
            name: found.settings.format if name in self._parts else files.dtypes[name] for name in names
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._files.shapes[name]
        outputs, inputs = self._found.format.shape(name.removesuffix(".weight"), self._stored(name), self._found.settings)
        return (inputs, outputs) if self._inputs_first(name) else (outputs, inputs)

    def _stored(self, name: str) -> dict[str, np.ndarray]:
        return {part: self._files.stored(stored) for part, stored in self._parts[name].items()}

    @property
    def settings(self) -> Settings:
        """What the quantization_config says."""
        return self._found.settings

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is a weight in codes."""
        return name in self._parts

    def codes(self, name: str) -> Codes | NormalFloat | None:
        """What is stored of a weight, or None if it is dense."""
        if name not in self._parts:
            return None
        return self._found.format.read(name.removesuffix(".weight"), self._stored(name), self._found.settings)

    def read(self, name: str) -> np.ndarray:
        """The tensor; a weight that is quantized in float32."""
        codes = self.codes(name)
        if codes is None:
            return self._files.read(name)
        return codes.dense().T if self._inputs_first(name) else codes.dense()
