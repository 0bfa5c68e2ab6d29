"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): LayerNorm, tanh-GELU, learned positions,
biases, head tied to the embedding, MLP four times as wide as the model."""

from ml_collections import ConfigDict

from jaxllm.models import decoder
from jaxllm.models.architecture import Family
from jaxllm.types import Constrain, Model, unconstrained

FAMILY = Family(
    name="gpt",
    kind="decoder",
    norm="layernorm",
    norm_order="pre",
    norm_eps=1e-5,
    activation="gelu_tanh",
    positions="learned",
    bias="on",
    tied_head=True,
)


def make(config: ConfigDict, *, constrain: Constrain = unconstrained) -> Model:
    """The model of the whole `config`, whose "auto" fields mean GPT-2's."""
    return decoder.make(config, FAMILY, constrain)
