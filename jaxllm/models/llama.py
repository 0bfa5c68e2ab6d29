"""LLaMA (Touvron et al. 2023, arXiv:2302.13971, section 2.2): RMSNorm, SwiGLU, rotary positions, no biases, a head of its own.
Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) by model.kv_heads; Llama 3 by model.rope_scaling.

Mistral (Jiang et al. 2023, arXiv:2310.06825) is this with model.window_tokens, Qwen2 (Yang et al. 2024, arXiv:2407.10671) with
model.bias = "qkv"."""

from ml_collections import ConfigDict

from jaxllm.models import decoder
from jaxllm.models.architecture import Family
from jaxllm.types import Constrain, Model, unconstrained

# The three matrices of SwiGLU at 8/3 of the width have as many parameters as two at 4 times.
FAMILY = Family(
    name="llama",
    kind="decoder",
    norm="rmsnorm",
    norm_order="pre",
    norm_eps=1e-5,
    activation="swiglu",
    positions="rope",
    bias="off",
    tied_head=False,
    mlp_factor=8 / 3,
    mlp_multiple=64,
)


def make(config: ConfigDict, *, constrain: Constrain = unconstrained) -> Model:
    """The model of the whole `config`, whose "auto" fields mean LLaMA's."""
    return decoder.make(config, FAMILY, constrain)
