"""BERT (Devlin et al. 2018, arXiv:1810.04805): an encoder with the norm after each residual sum, exact GELU, learned positions, token
types, and for the masked language model a head of its own over the tied embedding."""

from ml_collections import ConfigDict

from jaxllm.models import encoder
from jaxllm.models.architecture import Family
from jaxllm.types import Constrain, Model, unconstrained

FAMILY = Family(
    name="bert",
    kind="encoder",
    norm="layernorm",
    norm_order="post",
    norm_eps=1e-12,
    activation="gelu",
    positions="learned",
    bias="on",
    tied_head=True,
)


def make(config: ConfigDict, *, constrain: Constrain = unconstrained) -> Model:
    """The model of the whole `config`, whose "auto" fields mean BERT's."""
    return encoder.make(config, FAMILY, constrain)
