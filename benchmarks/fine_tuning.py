"""What full fine-tuning, LoRA and QLoRA need, from the compiler's own figures. Nothing is run, and no weights are read.

    python benchmarks/fine_tuning.py

One compiled train step of the shape of SmolLM2-135M (30 layers, 576 wide, vocabulary 49,152), 4 rows of 256 tokens, AdamW, rank 16 beside
all kernels. Temporaries are activations, gradients and, of quantized kernels, the dense ones that are made for use.
"""

import jax
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.engine.session import build_session, count
from jaxllm.parallel import forms, plan
from jaxllm.transforms import tree

WAYS = {"full": (), "lora": ("lora",), "int8 lora": ("int8", "lora"), "qlora": ("nf4", "lora")}


def make_config(transforms: tuple[str, ...], layers_as: str, remat: str) -> ConfigDict:
    config = schema.base()
    config.model.layers, config.model.width, config.model.heads, config.model.kv_heads = 30, 576, 9, 3
    config.model.mlp_width, config.model.vocab_size, config.model.context_tokens = 1536, 49_152, 256
    config.model.tied_head, config.model.layers_as, config.model.attention_block_tokens = "on", layers_as, 64
    config.model.remat = remat
    config.train.batch_seqs, config.train.transforms = 4, transforms
    config.parallel.data = 1
    return config


def main() -> None:
    columns = ("trained", "share", "weights MiB", "optimizer MiB", "temporaries MiB", "peak MiB", "of full", "GFLOP", "compile s")
    print(f"{'layers':9} {'remat':6} {'':10} " + " ".join(f"{name:>15}" for name in columns))
    for layers_as, remat in (("unrolled", "none"), ("scan", "none"), ("scan", "full")):
        first = 0
        for name, transforms in WAYS.items():
            config = make_config(transforms, layers_as, remat)
            session = build_session(config, plan.make(config))
            compiled, abstract = session.compile(), session.abstract
            first = first or compiled.peak_bytes
            whole = forms.weights(tree.combine(abstract.params, abstract.frozen))
            held = _mib((abstract.params, abstract.frozen)), _mib(abstract.opt_state), compiled.temp_bytes / 2**20
            # XLA counts the body of a scan once, so these FLOPs mean nothing there.
            flops = f"{compiled.flops / 1e9:.1f}" if layers_as == "unrolled" else "-"
            cells = [f"{count(abstract.params):,}", f"{count(abstract.params) / whole:.2%}", *(f"{size:,.1f}" for size in held)]
            cells += [f"{compiled.peak_bytes / 2**20:,.1f}", f"{compiled.peak_bytes / first:.2f}", flops]
            cells += [f"{compiled.compile_secs:.0f}"]
            print(f"{layers_as:9} {remat:6} {name:10} " + " ".join(f"{cell:>15}" for cell in cells), flush=True)


def _mib(tree: object) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 2**20


if __name__ == "__main__":
    main()
