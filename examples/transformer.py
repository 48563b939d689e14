"""An equilibrium transformer in mixed precision, with compiled solves on request.

One block, applied until nothing changes, replaces a stack of blocks. It learns to write Python letter by
letter from the source of the standard library. Under `torch.autocast` the block runs in bfloat16 while the
solver keeps its state in float32. With `--compile` the layer's solves are compiled, which takes minutes on a
CPU and is worthwhile only for long training.
"""

import argparse
import inspect
import sys
import time

import torch
from torch import nn

import torchimplicit as ti

WIDTH, HEADS, CONTEXT = 64, 4, 48


class Block(nn.Module):
    """Attention to the letters before, and a feed-forward layer; the input is added at every application."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        parts = self.heads(z + x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        z = self.first(z + x + self.out(seen.transpose(1, 2).flatten(2)))
        return self.second(z + self.narrow(nn.functional.gelu(self.wide(z))))


class Writer(nn.Module):
    """Scores of the next letter, `[batch, letters, alphabet]`, at every place."""

    def __init__(self, alphabet: int, compile: bool):
        super().__init__()
        self.letters, self.places = nn.Embedding(alphabet, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        solver, gradient = ti.Anderson(rtol=2e-2, max_steps=15), ti.UnrolledPhantom(steps=3)
        self.layer = ti.nn.Equilibrium(Block(), solver=solver, gradient=gradient, compile=compile)
        self.head = nn.Linear(WIDTH, alphabet)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.letters(text) + self.places.weight[: text.shape[1]]
        return self.head(self.layer(x, z0=torch.zeros_like(x)))


text = inspect.getsource(argparse)
alphabet = sorted(set(text))
numbers = torch.tensor([alphabet.index(letter) for letter in text])
train, held_out = numbers[:-8000], numbers[-8000:]


def batch(source: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(source) - CONTEXT - 1, (count, 1))
    rows = source[starts + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: Writer, source: torch.Tensor) -> torch.Tensor:
    given, wanted = batch(source, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(given)
    return nn.functional.cross_entropy(scores.float().flatten(0, 1), wanted.flatten())


curves = {}
for compile in (False, True) if "--compile" in sys.argv else (False,):
    torch.manual_seed(0)
    model = Writer(len(alphabet), compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, begun, first = [], time.perf_counter(), None
    for _ in range(60):
        loss = loss_of(model, train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        first = first or time.perf_counter() - begun
    rest = (time.perf_counter() - begun - first) / 59
    with torch.no_grad():
        bits = loss_of(model, held_out).item() / 0.6931
    how = "compiled" if compile else "eager"
    print(f"{how:8s} {bits:.2f} bits a letter; {model.layer.solution.summary()}")
    print(f"         the first step took {first:.1f} s, the others {1000 * rest:.0f} ms each", file=sys.stderr)
    curves[how] = losses
if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for how, losses in curves.items():
        axis.plot(losses, label=how)
    axis.set(xlabel="training step", ylabel="loss")
    axis.legend()
    figure.savefig(sys.argv[1], dpi=120)
