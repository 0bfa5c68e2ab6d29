"""The loss that training reaches with each `optimizer.state`, and the bytes that it takes.

    python benchmarks/optimizer_state.py --workdir runs/optimizer_state [--config configs/quickstart.py] [--steps 300] [--b2 0.95]

Trains the config once for each state, from the same weights on the same batches. The data is prepared by the first run and read by the
others. Rounding matters most with a b2 near 1, where a second moment moves little in a step.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train(arguments: argparse.Namespace, state: str) -> dict[str, float]:
    """The last losses, bytes of optimizer state and milliseconds a step of one run."""
    workdir = arguments.workdir / f"{arguments.name}_{state}_{arguments.b2}"
    given = {
        "train.steps": arguments.steps,
        "optimizer.name": arguments.name,
        "optimizer.state": state,
        "optimizer.b2": arguments.b2,
        "data.dir": arguments.workdir / "data",
        "eval.every_steps": 0,
        "eval.max_seqs": 0,
        "sample.tokens": 0,
        "checkpoint.every_steps": arguments.steps,
    }
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "jaxllm.train", "--config", arguments.config, "--workdir", str(workdir), *flags]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    last = [row for row in rows if row["kind"] == "train"][-1]
    return {
        "loss": [row for row in rows if row["kind"] == "eval"][-1]["loss"],
        "train_loss": last["loss"],
        "step_ms": 1000 * last["secs"] / last["step"],
        "bytes": record["bytes"]["optimizer"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--workdir", required=True, type=lambda text: Path(text).resolve())
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--name", default="adamw", help="optimizer.name")
    parser.add_argument("--b2", type=float, default=0.95, help="optimizer.b2")
    arguments = parser.parse_args()
    print(
        f"{'optimizer':10} {'b2':>6} {'state':9} {'validation loss':>16} {'training loss':>14} {'state MiB':>10} {'ms a step':>10}"
    )
    for state in ("float32", "bfloat16", "int8"):
        found = train(arguments, state)
        figures = f"{found['loss']:16.4f} {found['train_loss']:14.4f} {found['bytes'] / 2**20:10.2f} {found['step_ms']:10.0f}"
        print(f"{arguments.name:10} {arguments.b2:6} {state:9} {figures}", flush=True)


if __name__ == "__main__":
    main()
