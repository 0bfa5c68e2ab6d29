"""T5 (Raffel et al. 2019, arXiv:1910.10683, section 2.1): an encoder-decoder with RMSNorm before each sub-block, no biases, buckets of
relative positions, attention scores that are not divided, and a tied head behind a decoder output divided by sqrt(width).

This is v1.0, with ReLU. v1.1 (and mT5) is model.activation = "geglu" and model.tied_head = "off" (Shazeer 2020, arXiv:2002.05202).
Its activations overflow float16: use bfloat16 or float32."""

from ml_collections import ConfigDict

from jaxllm.models import encoder_decoder
from jaxllm.models.architecture import Family
from jaxllm.types import Constrain, Model, unconstrained

FAMILY = Family(
    name="t5",
    kind="encoder_decoder",
    norm="rmsnorm",
    norm_order="pre",
    norm_eps=1e-6,
    activation="relu",
    positions="relative",
    bias="off",
    tied_head=True,
    attention_scale=False,
    tied_head_scale=True,
)


def make(config: ConfigDict, *, constrain: Constrain = unconstrained) -> Model:
    """The model of the whole `config`, whose "auto" fields mean those of T5 v1.0. ValueError for float16."""
    if config.precision.compute == "float16":
        raise ValueError(
            "precision.compute = 'float16' with model.name = 't5', whose activations overflow it.\n  Accepted: bfloat16, float32.\n"
            "  Set precision.compute to one of these."
        )
    return encoder_decoder.make(config, FAMILY, constrain)
