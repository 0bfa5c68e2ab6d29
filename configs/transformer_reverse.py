"""The Transformer of 2017 learns to write a sequence backwards: about a minute on two CPU cores, nothing to download.

With --config.data.source=sequences:copy it learns to copy. Label smoothing, warm-up with an inverse square root and the optimizer's
b2 and eps are the paper's (Vaswani et al. 2017, arXiv:1706.03762, sections 5.3 and 5.4); the sizes are a toy's.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "transformer"
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 4
    config.model.context_tokens = 32
    config.train.objective = "seq2seq"
    config.train.label_smoothing = 0.1
    config.tokenizer.kind = "char"
    config.data.source = "sequences:reverse"
    config.train.steps = 1500
    config.train.batch_seqs = 32
    # The paper averages its last checkpoints (section 6.1).
    config.train.ema_decay = 0.99
    config.optimizer.learning_rate = 3e-3
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-9
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "inverse_sqrt"
    config.schedule.warmup_steps = 300
    config.eval.every_steps = 500
    config.eval.max_seqs = 512
    config.sample.every_steps = 500
    config.sample.tokens = 24
    config.sample.prompts = ("abcdefgh", "hello")
    return config
