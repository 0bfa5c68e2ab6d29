"""QLoRA of SmolLM2-135M-Instruct: sft_smollm2_lora.py, its kernels frozen in 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314).

Layers are scanned and computed again in the backward pass, so that on a CPU, too, the kernels of only one layer at a time are dense.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.attention_block_tokens = 64
    config.model.layers_as = "scan"
    config.model.remat = "full"
    config.data.source = "hf:HuggingFaceH4/no_robots?split=train"
    config.data.row_tokens = 256
    config.train.start = ".cache/smollm2/model.gguf"
    config.train.objective = "sft"
    config.train.transforms = ("nf4", "lora")
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
