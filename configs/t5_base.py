"""T5-base v1.0 (Raffel et al. 2019, arXiv:1910.10683, section 3.1), pre-trained on span corruption of your text on 8 devices.

Steps, batch and the inverse square root of the learning rate are the paper's (section 3.1.2 and 3.1.3); bfloat16 and Adafactor with our
defaults are untried at this size. --config.tokenizer.kind=file --config.tokenizer.path=spiece.model takes the published vocabulary.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "t5"
    config.model.layers = 12
    config.model.width = 768
    config.model.heads = 12
    config.model.mlp_width = 3072
    config.model.context_tokens = 512
    config.model.vocab_size = 32128
    config.model.dropout_frac = 0.1
    config.model.layers_as = "scan"
    config.model.remat = "dots"
    config.precision.compute = "bfloat16"
    config.tokenizer.kind = "unigram"
    config.tokenizer.vocab_size = 32000
    config.train.objective = "span_corruption"
    config.train.steps = 524_288
    config.train.batch_seqs = 128
    config.train.loss_chunk_tokens = 2048
    config.optimizer.name = "adafactor"
    # 1 / sqrt(max(step, 10,000)): a peak of 0.01 at the end of the warm-up.
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "inverse_sqrt"
    config.schedule.warmup_steps = 10_000
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 5_000
    config.sample.tokens = 0
    config.parallel.data = 2
    config.parallel.fsdp = 4
    return config
