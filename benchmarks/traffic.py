"""What a step moves between devices: predicted from config and mesh, beside what the compiled program does.

    python benchmarks/traffic.py --config configs/llama_1b.py --set parallel.fsdp=8 parallel.zero_stage=3

The step is compiled for pretend devices of the CPU, as many as the mesh has, and nothing is run. With `--gpu FILE` it is compiled for so
many GPUs that are not there, on one host: FILE describes one, as XLA's GpuTargetConfigProto in text form; that needs the packages
jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12.
"""

import argparse
import ast
import math
import os
from typing import Any

from rich.console import Console

from jaxllm import config as schema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the config, such as parallel.fsdp=8")
    parser.add_argument("--gpu", metavar="FILE", help="compile for this GPU")
    parser.add_argument("--list", action="store_true", help="also list each collective of the program")
    arguments = parser.parse_args()
    config = read(arguments.config, arguments.set)
    count = math.prod(config.parallel[axis] for axis in ("pipe", "data", "fsdp", "seq", "tensor"))
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count), "CUDA_VISIBLE_DEVICES": "-1"}
    show(config, devices(arguments.gpu, count), arguments.list)


def read(path: str, assignments: list[str]) -> Any:
    """The config with these fields; a size of -1 is 1, an open vocabulary 32,768."""
    config = schema.with_vocabulary(schema.load(path), 32_768)
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        section, _, name = key.rpartition(".")
        try:
            config[section][name] = ast.literal_eval(value)
        except ValueError:
            config[section][name] = value
    for axis in ("pipe", "data", "fsdp", "seq", "tensor"):
        config.parallel[axis] = max(config.parallel[axis], 1)
    schema.check(config)
    return config


def devices(gpu: str | None, count: int) -> Any:
    import jax

    if gpu is None:
        return jax.devices()
    from jax.experimental import topologies

    with open(gpu, encoding="utf-8") as file:
        topology = topologies.get_topology_desc(platform="cuda", target_config=file.read(), topology=f"1x1x{count}")
    return topology.devices


def show(config: Any, devices: Any, listed: bool) -> None:
    from jaxllm import dry_run
    from jaxllm.engine import session, step
    from jaxllm.parallel import collectives, plan, report, traffic

    console = Console()
    built = session.build_session(config, plan.make(config, devices))
    compiled = step.lower(built.update, built.abstract, step.abstract_batch(config, built.plan)).compile()
    found = collectives.read(compiled.as_text(), built.plan.mesh)
    rows, note = dry_run.moved(built, adds_first=devices[0].platform != "cpu")
    console.print(report.group(report.traffic(rows, note), report.comparison(traffic.compare(rows, found))))
    for line in collectives.summary(found, numbers=True):
        console.print(f"besides {line.arrays} single numbers, {line.kind} over {' x '.join(line.axes)}")
    memory: Any = compiled.memory_analysis()
    console.print(f"arguments {memory.argument_size_in_bytes:,} B, temporaries {memory.temp_size_in_bytes:,} B a device")
    for each in found if listed else ():
        console.print(f"{each.times} x {each.kind} over {' x '.join(each.axes)}: {each.arrays} B  {each.where}", highlight=False)


if __name__ == "__main__":
    main()
