"""Greedy decoding here and by transformers' `generate`, in turn, with the same weights in float32: tokens a second and time to the first.

    python benchmarks/decode.py --run DIRECTORY [--batches 1 8] [--prompts 64 1000] [--new 32] [--rounds 5] [--torch_threads N]

--run: a directory that both read (config.json, model.safetensors, tokenizer), such as jaxllm.convert --format hf makes of a GGUF file.
Needs torch and transformers (`pip install 'jaxllm[bench]'`). Prompts are random ids of one length, and nothing ends a text early.
Each round runs both sides one after the other, in this process, once for a single new token and once for --new more of them: the
difference is the time of these. What counts are the medians, and the median of the rounds' ratios. Compiling is left out: every shape
runs once before.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

from jaxllm import runs
from jaxllm.decode import generate
from jaxllm.ops import sampling

# (prompts, new tokens) -> the new ids of each
Write = Callable[[list[list[int]], int], list[list[int]]]


def load_here(path: str) -> tuple[Write, int]:
    """How jaxllm writes, and how many ids there are."""
    run = runs.load(path, for_decoding=True)

    def write(prompts: list[list[int]], new: int) -> list[list[int]]:
        return generate.generate(
            run.model,
            run.params,
            prompts,
            sampling.Settings(temperature=0),
            max_new_tokens=new,
            stop_ids=(),
            vocab_size=run.tokenizer.vocab_size,
            seed=0,
        )

    return write, run.tokenizer.vocab_size


def load_transformers(path: str) -> Write:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval().generation_config.eos_token_id = None

    def write(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
        return out[:, ids.shape[1] :].tolist()

    return write


def measure(write: Write, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """(seconds to the first new token, new tokens a second after it)."""
    began = time.perf_counter()
    write(prompts, 1)
    first = time.perf_counter()
    write(prompts, 1 + new)
    return first - began, len(prompts) * new / ((time.perf_counter() - first) - (first - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a directory of transformers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 1000], help="lengths of the prompts")
    parser.add_argument("--new", type=int, default=32, help="new tokens a prompt, behind the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--torch_threads", type=int, default=torch.get_num_threads(), help="1 is faster where others use the cores too"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.torch_threads)
    (here, vocab_size), theirs = load_here(args.run), load_transformers(args.run)
    rng = np.random.default_rng(0)
    print(f"{'':21} {'tokens/s':>8} {'':>12} {'':6} {'s to the first':>14}")
    heads = f"{'jaxllm':>8} {'transformers':>12} {'ratio':>6}"
    print(f"{'batch':>5} {'prompt':>6} {'equal ids':>8} {heads} {heads}")
    for batch in args.batches:
        for length in args.prompts:
            prompts = rng.integers(vocab_size, size=(batch, length)).tolist()
            found = [[np.array(write(prompts, new)) for new in (1, 1 + args.new)][1] for write in (here, theirs)]
            rounds = [(measure(here, prompts, args.new), measure(theirs, prompts, args.new)) for _ in range(args.rounds)]
            line = f"{batch:5} {length:6} {np.mean(found[0] == found[1]):9.0%}"
            for which, form in ((1, ".1f"), (0, ".3f")):
                ours, others = (statistics.median(pair[side][which] for pair in rounds) for side in (0, 1))
                ratio = statistics.median(pair[0][which] / pair[1][which] for pair in rounds)
                line += f" {ours:8{form}} {others:12{form}} {ratio:6.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
