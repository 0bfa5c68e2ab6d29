"""Rotary positions as GGUF files say them: in their metadata, or (Llama 3.1 and later) as a tensor with a divisor a frequency.

`fields` reads them, `values` and `divisors` are its inverse.
"""

import math
from typing import Any

import numpy as np

from jaxllm.interop.gguf_file import File
from jaxllm.models.architecture import Architecture
from jaxllm.ops.positions import RopeScaling

FACTORS = "rope_freqs.weight"
KINDS = ("none", "linear", "yarn")
# Llama 3's scaling in words: what FACTORS was made from, which other tools do not need and pass over.
LLAMA3 = {f"jaxllm.rope.{field}": field for field in ("factor", "original_tokens", "low_freq_factor", "high_freq_factor")}
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
        for key, accepted in (("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0)):
            _only(file, f"{name}.rope.scaling.{key}", accepted)
        if (on_top := file.get(f"{name}.rope.scaling.attn_factor", float, 1.0)) != 1.0:
            out["rope_attention_factor"] = decimal(on_top * _yarn_amplitude(factor))
        out["rope_beta_fast"] = decimal(file.get(f"{name}.rope.scaling.yarn_beta_fast", float, 32.0))
        out["rope_beta_slow"] = decimal(file.get(f"{name}.rope.scaling.yarn_beta_slow", float, 1.0))
        out["context_tokens"] = max(context, int(original * factor))
    return out


def values(arch: Architecture, name: str) -> dict[str, Any]:
    """The metadata of a model's rotary positions; `name` is the file's architecture."""
    out: dict[str, Any] = {f"{name}.rope.dimension_count": arch.head_dim, f"{name}.rope.freq_base": float(arch.rope_theta)}
    scaling = arch.rope_scaling
    if scaling is None:
        return out
    if scaling.kind == "llama3":
        return out | {key: float(getattr(scaling, field)) for key, field in LLAMA3.items()}
    said: dict[str, Any] = {"type": scaling.kind, "factor": float(scaling.factor)}
    said |= {"original_context_length": scaling.original_tokens}
    if scaling.kind == "yarn":
        said |= {"yarn_beta_fast": float(scaling.beta_fast), "yarn_beta_slow": float(scaling.beta_slow)}
        if scaling.attention_factor:
            said["attn_factor"] = scaling.attention_factor / _yarn_amplitude(scaling.factor)
    return out | {f"{name}.rope.scaling.{key}": value for key, value in said.items()}


def _yarn_amplitude(factor: float) -> float:
    """What cos and sin are multiplied with unless a model says otherwise; files hold what comes on top (`attn_factor`)."""
    return 0.1 * math.log(factor) + 1


def divisors(arch: Architecture) -> np.ndarray | None:
    """float32 [K/2]: the tensor FACTORS of a model with Llama 3's scaling; None for another one."""
    scaling = arch.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    return _divisors(scaling, _inverse_waves(arch.rope_theta, arch.head_dim)).astype(np.float32)


def _divisors(scaling: RopeScaling, inverse_k: np.ndarray) -> np.ndarray:
    """1 for short waves, `factor` for long ones, 1 / ((1 - s) / factor + s) between, where the share s = (waves - low) / (high - low)
    is linear in waves = original / wavelength; inverse_k: 1 / wavelength."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_k = np.clip((scaling.original_tokens * inverse_k - low) / (high - low), 0, 1)
    return 1 / ((1 - share_k) / scaling.factor + share_k)


def _inverse_waves(theta: float, head_dim: int) -> np.ndarray:
    """[K/2]: one by the wavelength of each pair of features, in tokens."""
    return theta ** -(np.arange(head_dim // 2) / (head_dim // 2)) / (2 * math.pi)


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
    """What made the divisors. Files of other converters do not say it: Llama 3's own numbers if they give them, else those that solve
    for them. Only high / low and original / low count: low is 1.
    """
    given_k = file.tensors[FACTORS].load().astype(np.float64).reshape(-1)
    if given_k.shape != (head_dim // 2,) or not np.all(np.isfinite(given_k)) or given_k.min() < 1 - CLOSE:
        raise ValueError(_no_llama3(file))
    inverse_k = _inverse_waves(theta, head_dim)
    factor = decimal(float(given_k.max()))
    if all(key in file.values for key in LLAMA3):
        said, original, low, high = (decimal(file.get(key, float)) for key in LLAMA3)
        guesses = [RopeScaling("llama3", said, int(original), low, high)]
    elif math.isclose(factor, 1.0, rel_tol=CLOSE):
        return {}
    else:
        pairs = [(8192, 4.0), *_solve(given_k, inverse_k, factor)]
        guesses = [RopeScaling("llama3", factor, original, 1.0, high) for original, high in pairs]
    for guess in guesses:
        if np.allclose(_divisors(guess, inverse_k), given_k, rtol=CLOSE, atol=0):
            return {"rope_scaling": "llama3"} | {f"rope_{field}": getattr(guess, field) for field in LLAMA3.values()}
    raise ValueError(_no_llama3(file))


def _solve(given_k: np.ndarray, inverse_k: np.ndarray, factor: float) -> list[tuple[int, float]]:
    """(original tokens, high) with low = 1 from a line through the shares between 0 and 1, which grow linearly with 1 / wavelength;
    empty if there are fewer than two."""
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
