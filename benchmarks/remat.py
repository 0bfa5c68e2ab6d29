"""What each remat policy and each optimizer state saves, and what recomputing costs, by the compiler's figures. Nothing is run.

    python benchmarks/remat.py [--attention blocked]

One train step of a LLaMA, 6 layers, 384 wide, vocabulary 8192, 8 x 512 tokens, float32, layers scanned. FLOPs are those of the same step
with unrolled layers before XLA's passes, since XLA counts the body of a scan once.
"""

import argparse

import jax
from ml_collections import ConfigDict

from jaxllm import config as schema
from jaxllm.engine import step
from jaxllm.engine.session import Session, build_session, bytes_by_category
from jaxllm.models.remat import POLICIES
from jaxllm.parallel import plan

MIB = 2**20


def make_session(attention: str, layers_as: str, **changes: str) -> Session:
    config: ConfigDict = schema.base()
    config.model.layers, config.model.width, config.model.heads, config.model.kv_heads = 6, 384, 6, 2
    config.model.context_tokens, config.model.vocab_size = 512, 8192
    config.model.attention, config.model.layers_as = attention, layers_as
    config.model.remat = changes.get("remat", "none")
    config.optimizer.name, config.optimizer.state = changes.get("name", "adamw"), changes.get("state", "float32")
    config.train.batch_seqs, config.parallel.data = 8, 1
    return build_session(config, plan.make(config))


def count_flops(session: Session) -> float:
    lowered = jax.jit(session.update).lower(session.abstract, step.abstract_batch(session.config, session.plan))
    costs = lowered.cost_analysis()
    return float(costs["flops"]) if costs else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="blocked", help="model.attention")
    attention = parser.parse_args().attention
    print(f"{'remat':10} {'arguments MiB':>14} {'temporaries MiB':>16} {'of none':>8} {'FLOPs of none':>14}")
    first = None
    for remat in POLICIES:
        compiled = make_session(attention, "scan", remat=remat).compile()
        flops = count_flops(make_session(attention, "unrolled", remat=remat))
        first = first or (compiled.temp_bytes, flops)
        shares = f"{compiled.temp_bytes / first[0]:8.2f} {flops / first[1]:14.2f}"
        print(f"{remat:10} {compiled.argument_bytes / MIB:14.1f} {compiled.temp_bytes / MIB:16.1f} {shares}", flush=True)
    print(f"\n{'optimizer':10} {'state':9} {'state MiB':>10} {'of float32':>11}")
    for name in ("adamw", "lion", "muon"):
        sizes = {
            state: bytes_by_category(make_session(attention, "scan", name=name, state=state))["optimizer"]
            for state in ("float32", "bfloat16", "int8")
        }
        for state, size in sizes.items():
            print(f"{name:10} {state:9} {size / MIB:10.2f} {size / sizes['float32']:11.3f}", flush=True)
    print(f"\n{'state':9} {'arguments MiB':>14} {'temporaries MiB':>16} {'peak MiB':>9}   (adamw, remat full)")
    for state in ("float32", "bfloat16", "int8"):
        compiled = make_session(attention, "scan", remat="full", state=state).compile()
        sizes_now = (compiled.argument_bytes / MIB, compiled.temp_bytes / MIB, compiled.peak_bytes / MIB)
        print("{:9} {:14.1f} {:16.1f} {:9.1f}".format(state, *sizes_now), flush=True)


if __name__ == "__main__":
    main()
