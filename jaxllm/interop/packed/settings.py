"""How the Linear layers of a directory are quantized, in our words."""

from typing import NamedTuple


class Settings(NamedTuple):
    """What a quantization_config says.

    format: "pack-quantized" or "int-quantized" (compressed-tensors), "gptq" or "gptq_v2", "awq", "nf4" (bitsandbytes); read, not
    written: "fp4" and "llm_int8" (bitsandbytes).
    group: inputs that share a scale, 0 for all. symmetric: every zero is the middle code. ordered: groups are given by an index.
    double: the scales of nf4 are quantized, too. rounds: so are activations, to 8 bits, each token by itself.
    ignore: names or patterns of what is not quantized. dtype: of the other tensors.
    """

    format: str
    bits: int
    group: int = 0
    symmetric: bool = True
    ordered: bool = False
    double: bool = False
    rounds: bool = False
    ignore: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def words(self) -> str:
        """For the user."""
        return f"{self.format}, {self.bits} bits" + (f", groups of {self.group} inputs" if self.group else "")
