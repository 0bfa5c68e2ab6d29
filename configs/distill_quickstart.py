"""A small student learns from the model of configs/quickstart.py, which is trained first: a few minutes on two CPU cores.

The student has the tokenizer and the text of its teacher. docs/distillation.md has what it gains over the same student without a teacher.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.context_tokens = 128
    config.model.attention_block_tokens = 64
    config.model.tied_head = "on"
    config.tokenizer.vocab_size = 2048
    config.data.source = "python_docs"
    config.train.objective = "distill"
    config.distill.teacher = "runs/quickstart"
    config.train.steps = 600
    config.train.batch_seqs = 16
    config.optimizer.learning_rate = 4e-3
    config.eval.every_steps = 200
    config.eval.max_seqs = 256
    config.sample.every_steps = 300
    config.sample.prompts = ("The ", "Return the ", "A class ")
    return config
