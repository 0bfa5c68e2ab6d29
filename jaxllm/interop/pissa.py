"""What PiSSA took out of a kernel, so that what was trained afterwards can stand beside the kernel as it was.

PiSSA freezes W' = W - s A0 B0 and trains A B from A0 B0 on (transforms/lora.py). W' + s A B = W + s (A B - A0 B0), which is a product of
twice the rank beside W: [A A0] and [B; -B0] (Meng et al. 2024, arXiv:2404.02948, section 3). A0 and B0 are not kept; any two matrices
with their product do, and W - W' is that product.
"""

import numpy as np

# Directions beyond the rank that are searched, so that none of the rank is missed (Halko et al. 2011, arXiv:0909.4061, section 1.3).
OVERSAMPLED = 8
# Largest part of W that W - W' may have outside of the rank, in roundings of the numbers of W'.
MOST_ROUNDINGS = 8


def taken(original: np.ndarray, base: np.ndarray, rank: int, scale: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(A0 [inputs, rank], B0 [rank, outputs]) in float32, with s A0 B0 = original - base, both [inputs, outputs].

    ValueError, with the tensor's `name`, if the difference is no matrix of this rank but for the rounding of `base`.
    """
    difference = original.astype(np.float64) - base.astype(np.float64)
    columns = min(rank + OVERSAMPLED, *difference.shape)
    drawn = np.random.default_rng(0).normal(size=(difference.shape[1], columns))
    basis, _ = np.linalg.qr(difference @ drawn)
    u, values, v = np.linalg.svd(basis.T @ difference, full_matrices=False)
    root = np.sqrt(values[:rank] / scale)
    a0, b0 = basis @ u[:, :rank] * root, root[:, None] * v[:rank]
    left = np.linalg.norm(difference - scale * a0 @ b0) / np.linalg.norm(original)
    if left > MOST_ROUNDINGS * _rounding(base):
        raise ValueError(
            f"{name}: the base that is given and the frozen kernel of the run differ in more than the rank {rank} that PiSSA took out"
            f" ({left:.1e} of the kernel are left over).\n"
            "  Accepted: the model that the run began with (train.start), with the weights that it had then.\n"
            "  Give that model as --base."
        )
    return a0.astype(np.float32), b0.astype(np.float32)


def _rounding(base: np.ndarray) -> float:
    """A rounding of its numbers, as a part of them: they may be bfloat16 in float32."""
    bits = np.ascontiguousarray(base, np.float32).view(np.uint32)
    return 2.0**-8 if not (bits & 0xFFFF).any() else 2.0**-23
