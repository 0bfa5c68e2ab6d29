"""Rotary positions as GGUF files say them: in their metadata, or (Llama 3.1 and later) as a tensor with a divisor a frequency."""

import math
from typing import Any

import numpy as np

from jaxllm.interop.gguf_file import File

FACTORS = "rope_freqs.weight"
KINDS = ("none", "linear", "yarn")
CLOSE = 1e-4  # relative; the divisors are stored in float32


def fields(file: File, name: str, head_dim: int, context: int) -> dict[str, Any]:
    """The rope_ fields of our model section, and context_tokens where scaling extends it; `name` is the file's architecture."""
    theta = decimal(file.get(f"{name}.rope.freq_base", float, 10000.0))
    out: dict[str, Any] = {"rope_theta": theta}
    kind, factor, original = _scaling(file, name, context)
    if FACTORS in file.tensors:
        if kind != "none":
            raise ValueError(
                f"'{file.path}' has both {FACTORS} and {name}.rope.scaling.type = '{kind}'.\n  Accepted: one of them.\n"
                "  Take another file of the model."
            )
        return out | _llama3(file, theta, head_dim)
    if kind == "none":
        return out
    out |= {"rope_scaling": kind, "rope_factor": factor, "rope_original_tokens": original}
    if kind == "yarn":
        for key in ("attn_factor", "yarn_attn_factor"):
            _only(file, f"{name}.rope.scaling.{key}", 1.0)
        for key in ("yarn_log_multiplier", "yarn_ext_factor"):
            _only(file, f"{name}.rope.scaling.{key}", 0.0 if key == "yarn_log_multiplier" else 1.0)
        out["rope_beta_fast"] = decimal(file.get(f"{name}.rope.scaling.yarn_beta_fast", float, 32.0))
        out["rope_beta_slow"] = decimal(file.get(f"{name}.rope.scaling.yarn_beta_slow", float, 1.0))
        out["context_tokens"] = max(context, int(original * factor))
    return out


def decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(file: File, name: str, context: int) -> tuple[str, float, int]:
    """(kind, factor, original tokens); old files have no kind, only a linear scale."""
    linear = file.get(f"{name}.rope.scale_linear", float, 1.0)
    kind = file.get(f"{name}.rope.scaling.type", str, "linear" if linear != 1.0 else "none")
    factor = decimal(file.get(f"{name}.rope.scaling.factor", float, linear))
    if kind not in KINDS:
        raise ValueError(
            f"'{file.path}' says {name}.rope.scaling.type = '{kind}'.\n  Accepted: {', '.join(KINDS)}, or a tensor {FACTORS}.\n"
            "  Take another model."
        )
    return ("none" if factor == 1.0 else kind), factor, file.get(f"{name}.rope.scaling.original_context_length", int, context)


def _only(file: File, key: str, accepted: float) -> None:
    found = file.get(key, float, accepted)
    if not math.isclose(found, accepted, rel_tol=1e-6):
        raise ValueError(f"'{file.path}' says {key} = {found:g}.\n  Accepted: {accepted:g}.\n  Take another model.")


def _llama3(file: File, theta: float, head_dim: int) -> dict[str, Any]:
    """What made the divisors, which the file does not say: Llama 3's own numbers if they give them, else those that solve for them.

    The divisor of a frequency is 1 for short waves, `factor` for long ones, 1 / ((1 - s) / factor + s) between, where the share
    s = (waves - low) / (high - low) is linear in waves = original / wavelength. Only high / low and original / low count: low is 1.
    """
    given_k = file.tensors[FACTORS].load().astype(np.float64).reshape(-1)
    if given_k.shape != (head_dim // 2,) or not np.all(np.isfinite(given_k)) or given_k.min() < 1 - CLOSE:
        raise ValueError(_no_llama3(file))
    factor = decimal(float(given_k.max()))
    if math.isclose(factor, 1.0, rel_tol=CLOSE):
        return {}
    inverse_k = theta ** -(np.arange(head_dim // 2) / (head_dim // 2)) / (2 * math.pi)
    for original, high in [(8192, 4.0), *_solve(given_k, inverse_k, factor)]:
        share_k = np.clip((original * inverse_k - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - share_k) / factor + share_k), given_k, rtol=CLOSE, atol=0):
            return {
                "rope_scaling": "llama3",
                "rope_factor": factor,
                "rope_original_tokens": original,
                "rope_low_freq_factor": 1.0,
                "rope_high_freq_factor": high,
            }
    raise ValueError(_no_llama3(file))


def _solve(given_k: np.ndarray, inverse_k: np.ndarray, factor: float) -> list[tuple[int, float]]:
    """(original tokens, high) with low = 1 from a line through the shares between 0 and 1; empty if there are fewer than two."""
    between_k = (given_k > 1 + CLOSE) & (given_k < factor * (1 - CLOSE))
    if between_k.sum() < 2:
        return []
    share_k = (1 / given_k[between_k] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(inverse_k[between_k], share_k, 1)
    high = decimal(1 - 1 / offset) if offset < 0 else 0.0
    return [(round(slope * (high - 1)), round(high, 4))] if high > 1 else []


def _no_llama3(file: File) -> str:
    return (
        f"the divisors of rotary frequencies in '{file.path}' ({FACTORS}) are not those of Llama 3's scaling.\n"
        "  Accepted: one number a pair of features, made from a factor, an original context and two frequency factors.\n"
        "  Take the Hugging Face directory of the model."
    )
