"""The shape of Llama 3.2 1B, 1.24 billion parameters, on 8 accelerators with ZeRO-3: one pass over 100 billion tokens of FineWeb-Edu.

Shape: the published config.json of Llama 3.2 1B, without its scaling of rotary frequencies. Learning rate, batch of 4 million tokens,
warm-up, AdamW's betas, epsilon and weight decay: OLMo 1B, Groeneveld et al. 2024, arXiv:2402.00838. Ours, and not tried at this size:
rows of 4096 tokens, the cosine to a tenth, the data and a tokenizer trained on it, how the model lies on the devices.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "llama"
    config.model.layers = 16
    config.model.width = 2048
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.head_dim = 64
    config.model.mlp_width = 8192
    config.model.context_tokens = 4096
    config.model.vocab_size = 128_256
    config.model.init_std = 0.02
    config.model.rope_theta = 500_000.0
    config.model.tied_head = "on"
    config.model.attention_block_tokens = 512
    config.model.layers_as = "scan"
    config.model.remat = "full"
    config.precision.compute = "bfloat16"
    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 128_256
    config.data.source = "hf:HuggingFaceFW/fineweb-edu?config=sample-100BT&split=train"
    config.data.validation_frac = 0.0001
    config.train.steps = 23_800
    config.train.batch_seqs = 1024
    config.train.microbatches = 32
    config.train.loss_chunk_tokens = 2048
    config.optimizer.learning_rate = 4e-4
    config.optimizer.eps = 1e-5
    config.schedule.warmup_steps = 2000
    config.eval.max_seqs = 1024
    config.parallel.data = 1
    config.parallel.fsdp = 8
    return config
