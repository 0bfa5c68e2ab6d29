"""A config's train step, compiled for TPUs that are not there: whether the compiler takes it, its memory, kernels and collectives.

    pip install -e '.[tpu]'
    python benchmarks/tpu_compile.py --config configs/llama_1b.py --topology v5e:2x4 --attention splash

The libtpu of the extra `tpu` compiles without a TPU for a topology that is only described. The mesh is that of the config.
"""

import argparse
import collections
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
# Without these libtpu asks a metadata server what it runs on, and refuses a second process.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
from jax.experimental import topologies

from jaxllm import config as schema
from jaxllm.engine.session import build_session
from jaxllm.parallel import plan

COLLECTIVE = re.compile(r" = (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
KERNEL = re.compile(r"%(\w+?)[.\d]* = .*custom_call_target=\"tpu_custom_call\"")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True, help="such as v5e:2x4, v5p:4x4x4")
    parser.add_argument("--attention", help="model.attention; that of the config unless given")
    parser.add_argument("--batch_seqs", type=int, help="train.batch_seqs, in one micro-batch; those of the config unless given")
    arguments = parser.parse_args()
    config = schema.load(arguments.config)
    if arguments.attention:
        config.model.attention = arguments.attention
    if arguments.batch_seqs:
        config.train.batch_seqs, config.train.microbatches = arguments.batch_seqs, 1
    devices = topologies.get_topology_desc(arguments.topology, platform="tpu").devices
    # What is traced here is to be for a TPU, though none is there to be the default.
    jax.default_backend = lambda: "tpu"
    session = build_session(schema.with_vocabulary(config, 32_768), plan.make(config, devices))
    compiled = session.compile()
    text = compiled.executable.as_text()
    print(f"{arguments.config} with {config.model.attention} on {arguments.topology}: compiled in {compiled.compile_secs:.0f} s")
    for name, size in (("arguments", compiled.argument_bytes), ("temporaries", compiled.temp_bytes), ("peak", compiled.peak_bytes)):
        print(f"  {name:12} {size / 2**30:8.2f} GiB a device")
    for name, count in sorted(collections.Counter(KERNEL.findall(text)).items()):
        print(f"  {count:4} x kernel {name}")
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for shapes, kind in COLLECTIVE.findall(text):
        found.update((kind, shape) for shape in re.findall(r"\w+\[[\d,]+\]", shapes))
    for (kind, shape), count in sorted(found.items()):
        print(f"  {count:4} x {kind} {shape}")


if __name__ == "__main__":
    main()
