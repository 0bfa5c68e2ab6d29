"""Architectures. `build` makes the one a config names."""

from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.types import Constrain, Model, unconstrained


def build(config: ConfigDict, constrain: Constrain = unconstrained) -> Model:
    """The model that the whole `config` describes; config.model.vocab_size must be filled in."""
    return registry.resolve("model", config.model.name)(config, constrain=constrain)
