"""Two processes on one machine, by gloo."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cells import TanhCell
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, spectral_norm, weight_norm

STEPS = 3


class Model(nn.Module):
    def __init__(self, gradient=None, norm=None):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        cell = TanhCell(6)
        if norm is not None:
            norm(cell.input)
        self.layer = Equilibrium(cell, gradient=gradient, rowwise=norm is None)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)))


def make(**options):
    torch.manual_seed(0)
    return Model(**options).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64)


def train(model, x, steps=STEPS):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()


def full(model):
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def compare(model, reference):
    expected, got = full(reference), full(model)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def data_parallel(rank, options):
    reference = make(**options)
    model = DistributedDataParallel(copy.deepcopy(reference))
    train(model, data()[4 * rank : 4 * rank + 4])
    train(reference, data())
    compare(model, reference)


def data_parallel_accumulating(rank, options):
    reference = make(**options)
    model = DistributedDataParallel(copy.deepcopy(reference))
    x = data()[4 * rank : 4 * rank + 4]
    with model.no_sync():
        ((model(x[:2]) ** 2).mean() / 2).backward()
    ((model(x[2:]) ** 2).mean() / 2).backward()
    (reference(data()) ** 2).mean().backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)


def sharded_layer_and_model(rank, options):
    reference = make(**options)
    model = copy.deepcopy(reference)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, data()[4 * rank : 4 * rank + 4])
    train(reference, data())
    compare(model, reference)


def sharded_model(rank, options):
    reference = make(**options)
    model = copy.deepcopy(reference)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    train(model, data()[4 * rank : 4 * rank + 4])
    train(reference, data())
    compare(model, reference)


def sharded_layer_alone(rank, options):
    reference = make(**options).layer
    layer = copy.deepcopy(reference)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    train(layer, data()[4 * rank : 4 * rank + 4])
    train(reference, data())
    compare(layer, reference)


def sharded_cell(rank, options):
    for part in ("cell", "recurrent"):
        model = make(**options)
        cell = model.layer.cell
        fully_shard(cell if part == "cell" else cell.recurrent, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match=r"fully_shard was applied inside the cell .* Apply it to the Equilibrium"):
            model(data())


def wrapped_cell(rank, options):
    layer = Equilibrium(DistributedDataParallel(TanhCell(6).double()))
    with pytest.raises(ValueError, match="DistributedDataParallel was applied inside the cell"):
        layer(data())


def work(rank, scenarios, path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for scenario, options in scenarios:
        try:
            scenario(rank, options)
        except BaseException as error:
            raise AssertionError(f"{scenario.__name__}, {options}: {error}") from error
        dist.barrier()
    dist.destroy_process_group()


def on_two_processes(tmp_path, *scenarios):
    """One start serves several scenarios: it takes longer than they do."""
    context = torch.multiprocessing.spawn(work, args=(scenarios, str(tmp_path / "rendezvous")), nprocs=2, join=False)
    try:
        for _ in range(4):  # one call returns as soon as one process has ended
            if context.join(timeout=60):
                return
        raise AssertionError("the processes did not end in time")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def test_data_parallel_training_is_that_of_one_process(tmp_path):
    on_two_processes(
        tmp_path,
        (data_parallel, {}),
        (data_parallel, {"gradient": ti.UnrolledPhantom(steps=60)}),
        (data_parallel, {"norm": weight_norm}),
        (data_parallel, {"norm": spectral_norm}),
        (data_parallel_accumulating, {}),
        (wrapped_cell, {}),
    )


def test_sharded_training_is_that_of_one_process_and_a_sharded_cell_is_refused(tmp_path):
    on_two_processes(
        tmp_path,
        (sharded_layer_and_model, {}),
        (sharded_layer_and_model, {"gradient": ti.UnrolledPhantom(steps=60)}),
        (sharded_model, {}),
        (sharded_layer_alone, {}),
        (sharded_cell, {}),
    )
