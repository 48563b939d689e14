"""A graph equilibrium with torch-geometric's layers: `layer(x, edge_index)`.

The state of every node is the fixed point of a message-passing layer, so information travels through the
whole graph, while k layers see only k hops. The task shows this: in chains of 30 nodes, each node has the
class of the chain's first node.
"""

import sys
from itertools import pairwise

import torch
from torch import nn
from torch_geometric.nn import GCNConv

import torchimplicit as ti


class Cell(nn.Module):
    """Any torch-geometric layer serves; tanh and a norm of the weights below one keep the map a contraction."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.inject = nn.Linear(features, width)
        self.conv = GCNConv(width, width, add_self_loops=False, normalize=False)
        ti.nn.spectral_norm(self.conv.lin, bound=0.99)

    def initial_state(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), self.inject.out_features)

    def forward(self, z: torch.Tensor, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(z, edge_index) + self.inject(x))


class Stack(nn.Module):
    """The explicit rival: as many layers as it says."""

    def __init__(self, features: int, width: int, depth: int):
        super().__init__()
        sizes = [features] + [width] * depth
        self.layers = nn.ModuleList(GCNConv(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x, edge_index))
        return x


def chains(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features `[nodes, 2]`, edges `[2, edges]` towards each chain's end, and the class of every node."""
    label = torch.arange(count) % 2
    x = torch.zeros(count, length, 2)
    x[torch.arange(count), 0, label] = 1
    start = torch.arange(count * length).view(count, length)[:, :-1].flatten()
    return x.flatten(0, 1), torch.stack((start, start + 1)), label.repeat_interleave(length)


x, edge_index, y = chains(20, 30)
x_test, edges_test, y_test = chains(20, 60)  # twice as long
losses = {}
for name, body in (
    ("equilibrium", ti.nn.Equilibrium(Cell(2, 16), batched=False)),
    ("four layers", Stack(2, 16, 4)),
):
    torch.manual_seed(1)
    head = nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=0.02)
    losses[name] = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(head(body(x, edge_index)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
    with torch.no_grad():
        right = (head(body(x_test, edges_test)).argmax(1) == y_test).view(20, 60).float().mean(0)
    print(f"{name}: {right.mean():.1%} of the nodes of longer chains are right, {right[-1]:.0%} of those at the end")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, curve in losses.items():
        axis.semilogy(curve, label=name)
    axis.set(xlabel="training step", ylabel="loss")
    axis.legend()
    figure.savefig(sys.argv[1], dpi=120)
