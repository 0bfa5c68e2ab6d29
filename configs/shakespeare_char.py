"""nanoGPT's CPU recipe for character-level Shakespeare: 4 layers, 4 heads, 128 wide, 2000 steps of 12 x 64 characters.

Needs the text: `--config.data.source=input.txt` (tinyshakespeare, 1,115,394 characters). nanoGPT documents a validation loss of 1.88.
One thing is ours: weights begin with a deviation of 1 / sqrt(128) = 0.088 (the default here) instead of GPT-2's 0.02, which suits a width
of 128 better; `--config.model.init_std=0.02` gives nanoGPT's. benchmarks/README.md has both results.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.seed = 1337
    config.model.name = "gpt"
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.context_tokens = 64
    config.model.bias = "off"
    config.model.activation = "gelu"
    config.tokenizer.kind = "char"
    config.data.source = "input.txt"
    config.data.split_by = "characters"
    config.data.validation_frac = 0.1
    config.data.cleaners = ()
    config.train.steps = 2000
    config.train.batch_seqs = 12
    config.train.loss_chunk_tokens = 0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_steps = 100
    config.schedule.end_frac = 0.1
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 500
    config.sample.prompts = ("\n",)
    config.sample.tokens = 60
    return config
