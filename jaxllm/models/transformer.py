"""The Transformer of 2017 (Vaswani et al., arXiv:1706.03762): an encoder-decoder with LayerNorm after each residual sum and nowhere else,
ReLU, sinusoids added to embeddings times sqrt(width), and one matrix for both embeddings and the head (section 3.4).

Label smoothing is train.label_smoothing = 0.1, its learning rate schedule.name = "inverse_sqrt" (section 5)."""

from ml_collections import ConfigDict

from jaxllm.models import encoder_decoder
from jaxllm.models.architecture import Family
from jaxllm.types import Constrain, Model, unconstrained

FAMILY = Family(
    name="transformer",
    kind="encoder_decoder",
    norm="layernorm",
    norm_order="post",
    norm_eps=1e-5,
    activation="relu",
    positions="sinusoid",
    bias="on",
    tied_head=True,
    embed_scale=True,
)


def make(config: ConfigDict, *, constrain: Constrain = unconstrained) -> Model:
    """The model of the whole `config`, whose "auto" fields mean those of the paper."""
    return encoder_decoder.make(config, FAMILY, constrain)
