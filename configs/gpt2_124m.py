"""GPT-2 small, 124M parameters, on 8 accelerators: one pass over 10 billion tokens of FineWeb-Edu.

Shape: Radford et al. 2019 (GPT-2), without dropout. Learning rate, batch of 0.5 million tokens, warm-up of 375 million tokens, cosine to a
tenth, AdamW's betas and weight decay: Brown et al. 2020, arXiv:2005.14165, table 2.1 (Small) and appendix B. Ours, and not tried here:
the data and a tokenizer of GPT-2's size trained on it (tokenizer.kind = "file" loads GPT-2's own), the number of devices.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "gpt"
    config.model.layers = 12
    config.model.width = 768
    config.model.heads = 12
    config.model.context_tokens = 1024
    config.model.vocab_size = 50257
    config.model.init_std = 0.02
    config.model.layers_as = "scan"
    config.model.remat = "dots"
    config.precision.compute = "bfloat16"
    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 50257
    config.data.source = "hf:HuggingFaceFW/fineweb-edu?config=sample-10BT&split=train"
    config.data.validation_frac = 0.001
    config.train.steps = 19_073
    config.train.batch_seqs = 512
    config.train.microbatches = 4
    config.train.loss_chunk_tokens = 2048
    config.optimizer.learning_rate = 6e-4
    config.schedule.warmup_steps = 715
    config.eval.max_seqs = 2048
    config.parallel.data = 8
    return config
