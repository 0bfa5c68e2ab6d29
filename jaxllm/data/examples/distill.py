"""What a student learns from a teacher on: the rows of text (causal_lm), or those of conversations (sft), as distill.rows says.

What the teacher says of them is kept beside them and joined to batches (engine/references.py).
"""

from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data.examples.contract import Examples


def make(config: ConfigDict) -> Examples:
    """The rows of another objective."""
    examples: Examples = registry.resolve("examples", config.distill.rows)(config)
    return examples
