"""The shape of Llama 3 70B, 70.6 billion parameters, on 256 accelerators: ZeRO-3 over 32, tensor parallelism over 8.

Shape, peak learning rate, rope_theta and context: Grattafiori et al. 2024, arXiv:2407.21783, table 3 and section 3. Batch of 4 million
tokens, warm-up, cosine to a tenth, AdamW's betas, epsilon and weight decay: Llama 2, Touvron et al. 2023, arXiv:2307.09288, section 2.2
(Llama 3 grew its batch and trained on 15 trillion tokens). Ours, and not tried at this size: 350 billion tokens of FineWeb-Edu, a
tokenizer trained on them, how the model lies on the devices.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "llama"
    config.model.layers = 80
    config.model.width = 8192
    config.model.heads = 64
    config.model.kv_heads = 8
    config.model.mlp_width = 28_672
    config.model.context_tokens = 8192
    config.model.vocab_size = 128_256
    config.model.init_std = 0.02
    config.model.rope_theta = 500_000.0
    config.model.attention_block_tokens = 512
    config.model.layers_as = "scan"
    config.model.remat = "full"
    config.precision.compute = "bfloat16"
    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 128_256
    config.data.source = "hf:HuggingFaceFW/fineweb-edu?config=sample-350BT&split=train"
    config.data.validation_frac = 0.0001
    config.train.steps = 83_400
    config.train.batch_seqs = 512
    config.train.microbatches = 16
    config.train.loss_chunk_tokens = 2048
    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.eps = 1e-5
    config.schedule.warmup_steps = 2000
    config.eval.max_seqs = 1024
    config.parallel.data = 1
    config.parallel.fsdp = 32
    config.parallel.tensor = 8
    return config
