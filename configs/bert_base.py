"""BERT-base (Devlin et al. 2018, arXiv:1810.04805, section 3), pre-trained on masked tokens of your text on 8 devices.

Rows of 512 tokens from the start, packed documents, bfloat16 and no next-sentence task are ours and untried at this size; the paper
trains 90 % of its steps at 128 tokens. --config.tokenizer.kind=file --config.tokenizer.path=vocab.txt takes a published vocabulary.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "bert"
    config.model.layers = 12
    config.model.width = 768
    config.model.heads = 12
    config.model.context_tokens = 512
    config.model.vocab_size = 30522
    config.model.init_std = 0.02
    config.model.dropout_frac = 0.1
    config.model.layers_as = "scan"
    config.model.remat = "dots"
    config.precision.compute = "bfloat16"
    config.tokenizer.vocab_size = 30000
    config.train.objective = "masked_lm"
    config.train.steps = 1_000_000
    config.train.batch_seqs = 256
    config.train.loss_chunk_tokens = 2048
    config.optimizer.learning_rate = 1e-4
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 10_000
    config.schedule.end_frac = 0.0
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 5_000
    config.sample.tokens = 0
    config.parallel.data = 2
    config.parallel.fsdp = 4
    return config
