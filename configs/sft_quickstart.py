"""The quickstart's model learns to answer questions: one to two minutes on two CPU cores, after `make quickstart`, nothing to download.

Questions and answers are made from Python's own documentation, which the model was trained on. chatml adds two tokens, so that the
embedding grows by two rows. With --config.train.transforms="('lora',)" an adapter is trained instead.
"""

from ml_collections import ConfigDict

from jaxllm.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.attention_block_tokens = 64
    config.data.source = "python_questions"
    config.chat.template = "chatml"
    config.train.start = "runs/quickstart"
    config.train.objective = "sft"
    config.train.steps = 300
    config.train.batch_seqs = 16
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.0
    config.schedule.warmup_steps = 30
    config.eval.every_steps = 100
    config.sample.every_steps = 300
    # These are held out in Python 3.11.
    config.sample.prompts = (
        "What does tarfile.TarFile.makedir do?",
        "Where is the class BufferingHandler?",
        "What are the arguments of logging.Logger.debug?",
    )
    config.sample.temperature = 0.0
    return config
