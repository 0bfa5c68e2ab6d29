"""A small LLaMA learns to add two numbers from examples, and is stopped early: the beginning of grpo_arithmetic.py."""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.layers = 3
    config.model.width = 96
    config.model.heads = 4
    config.model.context_tokens = 64
    config.model.attention_block_tokens = 64
    config.model.tied_head = "on"
    config.tokenizer.kind = "char"
    config.data.source = "sums:count=4000&digits=2"
    config.data.validation_source = "sums:first=4000&count=500&digits=2"
    config.chat.template = "plain"
    config.train.objective = "sft"
    config.train.steps = 250
    config.train.batch_seqs = 16
    config.optimizer.learning_rate = 3e-3
    config.schedule.warmup_steps = 50
    config.eval.every_steps = 100
    config.sample.prompts = ("12+7=", "58+36=")
    config.sample.tokens = 8
    config.sample.temperature = 0.0
    return config
