"""A small BERT on Python's own documentation: masked language modelling, four to five minutes on two CPU cores, nothing to download."""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "bert"
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.context_tokens = 128
    config.train.objective = "masked_lm"
    config.tokenizer.vocab_size = 2048
    config.data.source = "python_docs"
    config.train.steps = 800
    config.train.batch_seqs = 16
    # Post-norm: a higher rate or a shorter warm-up does not leave the plateau of the unigram distribution.
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup_steps = 200
    config.eval.every_steps = 200
    config.eval.max_seqs = 256
    config.sample.every_steps = 400
    config.sample.prompts = ("Return the <mask> of the list.", "A <mask> is an object.")
    return config
