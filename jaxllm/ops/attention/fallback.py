"""No silent fallback: what runs in the place of what was asked for is in the log, with the reason."""

import functools

from absl import logging


@functools.cache
def explain(asked: str, used: str, reason: str) -> None:
    """Logs, once a process for each reason, that `used` runs instead of `asked`."""
    logging.warning("attention: %s runs instead of %s: %s.", used, asked, reason)
