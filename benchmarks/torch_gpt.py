"""nanoGPT's CPU recipe in PyTorch: the other side of benchmarks/nanogpt.py. Our own few lines, not nanoGPT's code.

Prints one JSON object: validation loss over the whole validation split, seconds in the training loop, seconds a step.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS, WARMUP = 4, 4, 128, 64, 12, 2000, 100
PEAK, LAST = 1e-3, 1e-4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab: int, init_std: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=init_std / math.sqrt(2 * LAYERS) if residual else init_std)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (STEPS - WARMUP)
    return LAST + 0.5 * (1 + math.cos(math.pi * done)) * (PEAK - LAST)


@torch.no_grad()
def validation_loss(model: GPT, ids: Tensor) -> float:
    """Mean over consecutive windows of the whole split, the last partial window included."""
    total = 0.0
    starts = list(range(0, len(ids) - 1, CONTEXT))
    full = [start for start in starts if start + CONTEXT < len(ids)]
    for at in range(0, len(full), 64):
        group = full[at : at + 64]
        inputs = torch.stack([ids[start : start + CONTEXT] for start in group])
        targets = torch.stack([ids[start + 1 : start + CONTEXT + 1] for start in group])
        total += model(inputs, targets).item() * inputs.numel()
    for start in starts[len(full) :]:
        total += model(ids[None, start:-1], ids[None, start + 1 :]).item() * (len(ids) - 1 - start)
    return total / (len(ids) - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--init_std", type=float, default=WIDTH**-0.5)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = Path(args.data).read_text(encoding="utf-8")
    index = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[symbol] for symbol in text])
    cut = int(len(ids) * 0.9)
    train, validation = ids[:cut], ids[cut:]
    model = GPT(len(index), args.init_std)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)
    began = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        inputs = torch.stack([train[start : start + CONTEXT] for start in starts])
        targets = torch.stack([train[start + 1 : start + CONTEXT + 1] for start in starts])
        loss = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - began
    result = {"loss": validation_loss(model, validation), "train_secs": seconds, "step_ms": 1000 * seconds / args.steps}
    print(json.dumps({**result, "torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
