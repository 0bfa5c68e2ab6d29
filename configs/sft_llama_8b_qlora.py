"""QLoRA of a Llama 3 8B on one accelerator: its kernels frozen in 4 bits, 2 % as many weights trained beside them.

The recipe is that of Dettmers et al. 2023, arXiv:2305.14314, section 5 and table 9: NF4 with double quantization, adapters of rank 64
beside all kernels, alpha 16, dropout 0.1, a constant learning rate of 2e-4 and gradients cut to 0.3, rows of 512 tokens, 16 an update.
Set train.start to the directory or the GGUF file of the model; without it --dry_run plans the sizes below. Its step has run on one
GPU, with random weights: docs/fine_tuning.md has memory and speed.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "llama"
    config.model.layers = 32
    config.model.width = 4096
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.mlp_width = 14_336
    config.model.context_tokens = 8192
    config.model.vocab_size = 128_256
    config.model.rope_theta = 500_000.0
    config.model.layers_as = "scan"
    config.model.remat = "full"
    config.precision.compute = "bfloat16"
    config.precision.frozen = "bfloat16"
    config.data.source = "hf:HuggingFaceH4/no_robots?split=train"
    config.data.row_tokens = 512
    config.train.transforms = ("nf4", "lora")
    config.train.steps = 1875
    config.train.batch_seqs = 16
    config.train.microbatches = 4
    config.lora.rank = 64
    config.lora.alpha = 16.0
    config.lora.dropout_frac = 0.1
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.3
    config.schedule.name = "constant"
    return config
