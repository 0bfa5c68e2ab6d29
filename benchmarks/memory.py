"""What the chunked loss and each remat policy save, from the compiler's own figures. Nothing is run, so noise plays no part.

    python benchmarks/memory.py

Temporaries of one compiled train step (LLaMA, 8 layers, 512 wide, vocabulary 32,000, 8 x 512 tokens, float32), beside the
step with everything off; and its FLOPs as XLA counts them, which shows what recomputing costs.
"""

import itertools

from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.engine.session import build_session
from jaxllm.engine.step import Compiled
from jaxllm.parallel import plan


def make_config(chunk_tokens: int, remat: str, layers_as: str) -> ConfigDict:
    config = schema.base()
    config.model.layers, config.model.width, config.model.heads, config.model.kv_heads = 8, 512, 8, 4
    config.model.context_tokens, config.model.vocab_size = 512, 32000
    config.model.remat, config.model.layers_as = remat, layers_as
    config.train.batch_seqs, config.train.loss_chunk_tokens = 8, chunk_tokens
    config.parallel.data = 1
    return config


def measure(chunk_tokens: int, remat: str, layers_as: str) -> Compiled:
    config = make_config(chunk_tokens, remat, layers_as)
    return build_session(config, plan.make(config)).compile()


def main() -> None:
    print(f"{'layers':10} {'remat':6} {'loss':>12} {'temporaries MiB':>16} {'of the first':>13} {'GFLOP':>8} {'compile s':>10}")
    for layers_as in ("unrolled", "scan"):
        first = None
        for remat, chunk_tokens in itertools.product(("none", "dots", "full"), (0, 256)):
            compiled = measure(chunk_tokens, remat, layers_as)
            first = first or compiled
            loss = f"{chunk_tokens} tokens" if chunk_tokens else "whole"
            # XLA counts the body of a scan once, so these FLOPs mean nothing there.
            flops = f"{compiled.flops / 1e9:8.1f}" if layers_as == "unrolled" else f"{'-':>8}"
            share = compiled.temp_bytes / first.temp_bytes
            figures = f"{compiled.temp_bytes / 2**20:16.1f} {share:13.2f} {flops} {compiled.compile_secs:10.1f}"
            print(f"{layers_as:10} {remat:6} {loss:>12} {figures}")


if __name__ == "__main__":
    main()
