"""nanoGPT's CPU recipe here and in PyTorch, in turn: validation loss over the whole split, and time.

    python benchmarks/nanogpt.py --data input.txt [--rounds 3] [--devices 2] [--init_std 0.02] [--seed 1]

Needs tinyshakespeare (1,115,394 characters) and torch (`pip install 'jaxllm[bench]'`). Each round runs both programs one after
the other in fresh processes; what counts are the medians and the median of the rounds' ratios. Counted floors on this split:
bigram 2.482, trigram 2.050; nanoGPT documents 1.88.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train_here(data: str, init_std: float, seed: int, devices: int) -> dict[str, float]:
    """Runs `jaxllm.train` on configs/shakespeare_char.py without the evaluations and samples in between."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable,
            "-m",
            "jaxllm.train",
            "--config",
            str(ROOT / "configs/shakespeare_char.py"),
            "--workdir",
            workdir,
        ]
        quiet = ["--config.eval.every_steps=0", "--config.sample.every_steps=0", "--config.checkpoint.every_steps=2000"]
        began = time.perf_counter()
        given = [f"--config.data.source={data}", f"--config.model.init_std={init_std}", f"--config.seed={seed}"]
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        subprocess.run([*command, *quiet, *given], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        total = time.perf_counter() - began
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "eval"]
    last = [row for row in rows if row["kind"] == "train"][-1]
    return {"loss": losses[-1], "train_secs": last["secs"], "step_ms": 1000 * last["secs"] / last["step"], "process_secs": total}


def train_torch(data: str, init_std: float, seed: int) -> dict[str, float]:
    began = time.perf_counter()
    program = str(ROOT / "benchmarks/torch_gpt.py")
    command = [sys.executable, program, "--data", data, "--init_std", str(init_std), "--seed", str(seed)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {**json.loads(output.splitlines()[-1]), "process_secs": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tinyshakespeare as one text file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--init_std", type=float, default=128**-0.5, help="of the weights on both sides; nanoGPT has 0.02")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--devices", type=int, default=1, help="pretend devices of jaxllm, which then splits the batch over them")
    args = parser.parse_args()
    given = (str(Path(args.data).resolve()), args.init_std, args.seed)
    rounds = [(train_here(*given, args.devices), train_torch(*given)) for _ in range(args.rounds)]
    print(f"{'median of ' + str(args.rounds):24} {'jaxllm':>10} {'PyTorch':>10} {'ratio':>8}")
    for key in ("loss", "step_ms", "train_secs", "process_secs"):
        ours, theirs = statistics.median(a[key] for a, _ in rounds), statistics.median(b[key] for _, b in rounds)
        print(f"{key:24} {ours:10.4g} {theirs:10.4g} {statistics.median(a[key] / b[key] for a, b in rounds):8.3f}")
    print(json.dumps({"jaxllm": [a for a, _ in rounds], "torch": [b for _, b in rounds]}))


if __name__ == "__main__":
    main()
