"""A small T5 on Python's own documentation: span corruption, about four minutes on two CPU cores, nothing to download."""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "t5"
    config.model.layers = 3
    config.model.width = 128
    config.model.heads = 4
    config.model.context_tokens = 128
    config.train.objective = "span_corruption"
    config.tokenizer.vocab_size = 2048
    config.data.source = "python_docs"
    config.train.steps = 800
    config.train.batch_seqs = 16
    config.optimizer.learning_rate = 3e-3
    config.eval.every_steps = 200
    config.eval.max_seqs = 256
    config.sample.every_steps = 400
    config.sample.prompts = ("Return the <extra_id_0> of the list.", "A <extra_id_0> is an object.")
    return config
