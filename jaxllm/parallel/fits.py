"""Whether a config fits the sizes of a mesh: everything that can be said before a model is built."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from jaxllm.consistency import ADAPTERS, divisors
from jaxllm.data import examples

ENCODER_DECODERS = ("t5", "transformer")
DECODERS = ("gpt", "llama")


def zigzag(config: ConfigDict, seq: int) -> bool:
    """Whether rows lie in the order of data/places.py: what comes first in a row has less to do where nobody looks ahead.

    Not with ulysses, where each device has whole rows, nor in an encoder-decoder, whose encoder looks ahead.
    """
    return seq > 1 and config.parallel.context == "ring" and config.model.name in DECODERS


def check(config: ConfigDict, mesh: Mapping[str, int]) -> None:
    """ValueError, naming the fields, what is accepted and what to change."""
    _check_rows(config, mesh["data"] * mesh["fsdp"])
    if mesh["seq"] > 1:
        _check_lengths(config, mesh["seq"])
        _check_heads(config, mesh)
    if mesh["pipe"] > 1 and mesh["seq"] > 1 and config.parallel.context == "ring":
        raise ValueError(
            "parallel.context = 'ring' in a pipeline: in a ring's sends all devices take part at once, and stages do different things.\n"
            "  Accepted: ulysses, whose exchanges stay inside a stage.\n  Set parallel.context=ulysses."
        )
    if mesh["pipe"] > 1:
        _check_pipeline(config, mesh["pipe"])


def notes(config: ConfigDict, mesh: Mapping[str, int]) -> list[str]:
    """What fits, but is wasteful or of no effect, one line each."""
    parallel, microbatches, found = config.parallel, config.train.microbatches, []
    if microbatches < mesh["pipe"]:
        idle = (mesh["pipe"] - 1) / (microbatches + mesh["pipe"] - 1)
        found.append(
            f"the {mesh['pipe']} stages of the pipeline are idle for {idle:.0%} of the time, as only train.microbatches = {microbatches}"
            f" pass through them; {2 * mesh['pipe']} or more are advised"
        )
    if not config.train.start and any(name in ADAPTERS for name in config.train.transforms):
        found.append("the adapters stand beside random weights: train.start is empty")
    without = {
        "parallel.sequence": parallel.sequence and mesh["tensor"] == 1 and "tensor",
        "parallel.chunks": parallel.chunks and mesh["pipe"] == 1 and "pipe",
        "parallel.zero_stage": parallel.zero_stage != 3 and mesh["fsdp"] == 1 and "fsdp",
    }
    found += [f"{field} has no effect with parallel.{axis} = 1" for field, axis in without.items() if axis]
    if mesh["seq"] > 1 and parallel.context == "ring" and config.model.attention != "blocked":
        found.append(
            f"model.attention = '{config.model.attention}' has no effect with parallel.context = 'ring', which has its own"
        )
    return found


def _check_rows(config: ConfigDict, parts: int) -> None:
    """Each part of a batch gets as many rows."""
    train = config.train
    rows = train.batch_seqs // train.microbatches
    if rows % parts:
        raise ValueError(
            f"train.batch_seqs / train.microbatches = {train.batch_seqs} / {train.microbatches} = {rows} rows cannot be shared out"
            f" over parallel.data x parallel.fsdp = {parts}.\n  Accepted: multiples of {parts} rows.\n"
            f"  Set train.batch_seqs to a multiple of {parts * train.microbatches}, such as"
            f" {-(-rows // parts) * parts * train.microbatches}."
        )


def _check_lengths(config: ConfigDict, seq: int) -> None:
    """Each part of a row has as many tokens; two runs of them if rows lie in zigzag."""
    runs = 2 * seq if zigzag(config, seq) else seq
    for name, array in examples.make(config).arrays.items():
        if array.width % runs:
            raise ValueError(
                f"rows of {array.width} {name} cannot be cut into {runs} equal runs for parallel.seq = {seq}"
                f"{', two for each device (docs/context_parallel.md)' if runs > seq else ''}.\n"
                f"  Accepted: multiples of {runs} tokens; parallel.seq that divides them.\n"
                f"  Set data.row_tokens (or data.input_tokens) to a multiple, such as {-(-array.width // runs) * runs}, or parallel.seq."
            )


def _check_heads(config: ConfigDict, mesh: Mapping[str, int]) -> None:
    heads = config.model.heads // math.gcd(config.model.heads, mesh["tensor"])
    if config.parallel.context == "ulysses" and heads % mesh["seq"]:
        raise ValueError(
            f"parallel.context = 'ulysses' shares out {heads} heads (model.heads / parallel.tensor) over parallel.seq = {mesh['seq']}.\n"
            f"  Accepted: parallel.seq = {divisors(heads)}; parallel.context = 'ring', which takes any number.\n  Change one of them."
        )


def _check_pipeline(config: ConfigDict, stages: int) -> None:
    model, parallel = config.model, config.parallel
    if model.layers_as != "scan":
        raise ValueError(
            f"parallel.pipe = {stages} needs layers that lie stacked, but model.layers_as = '{model.layers_as}'.\n  Accepted: scan.\n"
            "  Set model.layers_as=scan."
        )
    if config.precision.compute == "float16":
        raise ValueError(
            "precision.compute = 'float16' in a pipeline, whose gradients are not scaled.\n  Accepted: float32, bfloat16.\n"
            "  Set precision.compute."
        )
    both = model.name in ENCODER_DECODERS
    if both and parallel.schedule == "1f1b":
        raise ValueError(
            f"parallel.schedule = '1f1b' has one run of layers a stage, and model.name = '{model.name}' two: encoder and decoder.\n"
            "  Accepted: interleaved, which is 1F1B with several runs; gpipe, zb_h1.\n  Set parallel.schedule."
        )
    chunks = chunks_a_stack(config)
    if parallel.schedule == "1f1b" and chunks > 1 or parallel.schedule == "interleaved" and chunks == 1 and not both:
        raise ValueError(
            f"parallel.schedule = '{parallel.schedule}' with parallel.chunks = {chunks}.\n"
            "  Accepted: 1 for 1f1b, 2 or more for interleaved; any number for gpipe and zb_h1.\n  Change one of them."
        )
    depths = {"model.layers": model.layers} | ({"model.decoder_layers": model.decoder_layers or model.layers} if both else {})
    for name, layers in depths.items():
        if layers % (stages * chunks):
            raise ValueError(
                f"{name} = {layers} cannot be shared out over parallel.pipe x parallel.chunks = {stages} x {chunks} runs of layers.\n"
                f"  Accepted: multiples of {stages * chunks} layers; parallel.pipe x parallel.chunks = {divisors(layers)}.\n"
                f"  Change one of them."
            )


def chunks_a_stack(config: ConfigDict) -> int:
    """Runs of layers that a stage has of each stack."""
    several = config.parallel.schedule == "interleaved" and config.model.name not in ENCODER_DECODERS
    return config.parallel.chunks or (2 if several else 1)
