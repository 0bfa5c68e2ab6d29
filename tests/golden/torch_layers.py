"""The 2017 Transformer out of torch.nn layers, under jaxllm's own parameter names: it has no Hugging Face twin.

torch.nn.Transformer would add a norm behind each stack, which the paper has not; so the layers are called one by one.
"""

import numpy as np
import torch
from torch import nn


def sinusoids(length: int, width: int) -> torch.Tensor:
    """[T, D]: sin(p / 10000^(2i/D)) at 2i, cos at 2i + 1 (Vaswani et al. 2017, arXiv:1706.03762, section 3.5), in float64."""
    angles = np.arange(length)[:, None] / 10000.0 ** (2 * np.arange(width // 2) / width)
    return torch.tensor(np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, width), dtype=torch.float32)


class Transformer(nn.Module):
    """Embeddings times sqrt(D), one matrix for its three uses (section 3.4), label smoothing of 0.1 (section 5.4)."""

    def __init__(self, vocab: int, width: int, heads: int, mlp: int, layers: int) -> None:
        super().__init__()
        sizes = {"d_model": width, "nhead": heads, "dim_feedforward": mlp, "dropout": 0.0, "batch_first": True, "norm_first": False}
        self.embed = nn.Embedding(vocab, width)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**sizes) for _ in range(layers))

    def forward(
        self, inputs_BS: torch.Tensor, input_mask_BS: torch.Tensor, tokens_BT: torch.Tensor, labels_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_BTV, mean loss over the labels that are not -100)."""
        unseen_BS = input_mask_BS == 0
        hidden_inputs = self.enter(inputs_BS)
        for layer in self.encoder:
            hidden_inputs = layer(hidden_inputs, src_key_padding_mask=unseen_BS)
        hidden = self.enter(tokens_BT)
        later_TT = torch.ones(tokens_BT.shape[1], tokens_BT.shape[1], dtype=torch.bool).triu(1)
        for layer in self.decoder:
            hidden = layer(hidden, hidden_inputs, tgt_mask=later_TT, memory_key_padding_mask=unseen_BS)
        logits = hidden @ self.embed.weight.T
        return logits, nn.functional.cross_entropy(
            logits.flatten(0, 1), labels_BT.flatten(), ignore_index=-100, label_smoothing=0.1
        )

    def enter(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        width = self.embed.embedding_dim
        return self.embed(tokens_BT) * width**0.5 + sinusoids(tokens_BT.shape[1], width)


def rename(tensors: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Weights or gradients of `Transformer` as jaxllm names and shapes them; of layer i, "layers" is "layers/i"."""
    renamed = {"embed/tokens": tensors["embed.weight"]}
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("encoder"))
    for side, blocks in (("encoder", ("attention", "mlp")), ("decoder", ("attention", "cross", "mlp"))):
        for layer in range(layers):
            source, target = f"{side}.{layer}.", f"{side}/layers/{layer}/"
            for number, block in enumerate(blocks, 1):
                for ours, theirs in (("scale", "weight"), ("bias", "bias")):
                    renamed[f"{target}{block}/norm/{ours}"] = tensors[f"{source}norm{number}.{theirs}"]
                if block != "mlp":
                    module = source + {"attention": "self_attn.", "cross": "multihead_attn."}[block]
                    renamed |= {f"{target}{block}/{name}": value for name, value in _attention(tensors, module, heads).items()}
            for ours, theirs in (("up", "linear1"), ("down", "linear2")):
                renamed[f"{target}mlp/{ours}/kernel"] = tensors[f"{source}{theirs}.weight"].T
                renamed[f"{target}mlp/{ours}/bias"] = tensors[f"{source}{theirs}.bias"]
    return renamed


def _attention(tensors: dict[str, torch.Tensor], module: str, heads: int) -> dict[str, torch.Tensor]:
    out = tensors[module + "out_proj.weight"].T
    width = len(out)
    renamed = {"o/kernel": out.reshape(heads, width // heads, width), "o/bias": tensors[module + "out_proj.bias"]}
    kernels, biases = tensors[module + "in_proj_weight"].chunk(3), tensors[module + "in_proj_bias"].chunk(3)
    for name, kernel, bias in zip("qkv", kernels, biases, strict=True):
        renamed[f"{name}/kernel"] = kernel.T.reshape(width, heads, width // heads)
        renamed[f"{name}/bias"] = bias.reshape(heads, width // heads)
    return renamed
