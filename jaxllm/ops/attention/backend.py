"""What an implementation of attention says of itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxllm.ops.attention.mask import Mask


class Backend(NamedTuple):
    """An implementation of attention, as the registry names it. Called, it attends.

    attend: a function with the signature of `plain.attend`.
    refuse: why it cannot do what it is asked for, here and on arrays of these shapes, or None. rng is None without dropout.
    per_device: the compiler cannot share it out, so each device has to run it on the rows and heads that it holds.
    """

    attend: Callable[..., jax.Array]
    refuse: Callable[[jax.Array, jax.Array, Mask, jax.Array | None, Any], str | None] = lambda *_: None
    per_device: bool = False

    def __call__(self, *arrays: Any, **options: Any) -> jax.Array:
        return self.attend(*arrays, **options)
