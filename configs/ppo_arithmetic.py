"""The model of sums_sft.py learns to add better from its own answers (PPO): a value head says what it expects of each token."""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.attention_block_tokens = 64
    config.data.source = "sums:count=4000&digits=2"
    config.data.validation_source = "sums:first=4000&count=500&digits=2"
    config.train.start = "runs/sums_sft"
    config.train.objective = "ppo"
    config.train.steps = 300
    config.train.batch_seqs = 64
    config.rl.prompts = 256
    config.rl.answers = 1
    config.rl.max_new_tokens = 5
    config.rl.refresh_steps = 2
    config.rl.rewards = (("exact_match", 1.0),)
    config.rl.kl = 0.1
    config.rl.kl_target = 0.5
    config.rl.kl_horizon = 1000
    config.rl.value_coef = 0.5
    config.rl.field_bytes = 32
    config.optimizer.learning_rate = 5e-4
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "linear"
    config.schedule.end_frac = 0.0
    config.schedule.warmup_steps = 10
    config.eval.every_steps = 100
    config.sample.prompts = ("12+7=", "58+36=")
    config.sample.tokens = 8
    config.sample.temperature = 0.0
    return config
