"""NaN and infinity, in the input or in the incoming gradient: there in the sample's own results, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti
from tests.truth import cores, modes
from tests.truth.case import Case
from tests.truth.data import Data

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENTS = {
    "implicit": ti.Implicit(),
    "dense": ti.Implicit(linear_solver=ti.Dense()),
    "gmres": ti.Implicit(linear_solver=ti.GMRES()),
    "bicgstab": ti.Implicit(linear_solver=ti.BiCGStab()),
    "lsmr": ti.Implicit(linear_solver=ti.LSMR()),
    "neumann": ti.Implicit(linear_solver=ti.Neumann()),
    "one-step": ti.OneStep(),
    "neumann-phantom": ti.NeumannPhantom(),
    "unrolled-phantom": ti.UnrolledPhantom(),
    "adaptive-phantom": ti.AdaptivePhantom(),
    "unbiased-neumann": ti.UnbiasedNeumann(generator=torch.Generator()),
    "shared-inverse": ti.SharedInverse(),
    "unrolled": ti.Unrolled(),
    "reversible": ti.Reversible(),
}
OF_MINIMA = {
    "implicit": ti.Implicit(),
    "cg": ti.Implicit(linear_solver=ti.CG()),
    "minres": ti.Implicit(linear_solver=ti.MINRES()),
    "dense": ti.Implicit(linear_solver=ti.Dense()),
    "damped": ti.DampedImplicit(damping=0.1),
    "damped-automatic": ti.DampedImplicit(),
    "nudged": ti.EquilibriumPropagation(),
    "nudged-automatic": ti.EquilibriumPropagation(nudge=None),
}
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
KINDS = [("fixed_point", name) for name in GRADIENTS] + [("minimum", name) for name in OF_MINIMA]
KINDS += [("root", name) for name in ("implicit", "dense", "gmres", "bicgstab", "lsmr")]


def solved(kind, name, tensors, dtype, rowwise=False):
    case = Case(number=7)
    start = torch.zeros(3, 4, dtype=dtype)
    if kind == "minimum":
        problem = ti.Minimum(lambda z, x, p: energy(z, {**tensors, "x": x, "p": p}), rowwise=rowwise)
        gradient, solver = OF_MINIMA[name], None
    else:
        core = {"fixed_point": cores.image, "root": cores.root}[kind]
        make = {"fixed_point": ti.FixedPoint, "root": ti.Root}[kind]
        problem = make(lambda z, x, p: core(z, {**tensors, "x": x, "p": p}, case.activation, "", None), rowwise=rowwise)
        gradient = GRADIENTS[name]
        solver = {"shared-inverse": ti.Broyden(), "reversible": ti.ReversibleIteration()}.get(name)
    return ti.solve(problem, start, tensors["x"], tensors["p"], solver=solver, gradient=gradient, throw=False)


def energy(z, tensors):
    return cores.energy(z, tensors, "tanh", "", None)


def leaves(dtype):
    return modes.leaves_of({name: t.to(dtype) for name, t in Data(Case(number=7)).tensors.items()})


def gradients(solution, tensors, cotangent):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        return torch.autograd.grad((solution.value * cotangent).sum(), list(tensors.values()), allow_unused=True)


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_cotangent_that_is_not_finite(kind, name, bad, dtype, rowwise):
    tensors = leaves(dtype)
    cotangent = torch.linspace(-1, 2, 12, dtype=dtype).reshape(3, 4)
    if name == "unbiased-neumann":
        GRADIENTS[name].generator.manual_seed(0)
    good = dict(zip(tensors, gradients(solved(kind, name, tensors, dtype, rowwise), tensors, cotangent)))
    cotangent[1, 2] = BAD[bad]
    if name == "unbiased-neumann":
        GRADIENTS[name].generator.manual_seed(0)
    try:
        got = dict(zip(tensors, gradients(solved(kind, name, tensors, dtype, rowwise), tensors, cotangent)))
    except ti.SolveError:
        return
    others = torch.tensor([0, 2])
    for which in ("x", "p"):
        torch.testing.assert_close(got[which][others], good[which][others], rtol=1e-4, atol=1e-6)
    silent = [which for which in ("W", "U", "b") if bool(got[which].isfinite().all())]
    silent += [which for which in ("x", "p") if bool(got[which][1].isfinite().all())]
    # plain PyTorch spreads it to all that the sample shares with the others
    assert not silent


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in KINDS if "nudged" not in name])
def test_an_input_that_is_not_finite(kind, name, bad, rowwise):
    tensors = leaves(torch.float64)
    cotangent = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
    if name == "unbiased-neumann":
        GRADIENTS[name].generator.manual_seed(0)
    whole = solved(kind, name, tensors, torch.float64, rowwise)
    good = dict(zip(tensors, gradients(whole, tensors, cotangent)))
    with torch.no_grad():
        tensors["x"][1, 0] = BAD[bad]
    if name == "unbiased-neumann":
        GRADIENTS[name].generator.manual_seed(0)
    solution = solved(kind, name, tensors, torch.float64, rowwise)
    others = torch.tensor([0, 2])
    finite_map = bad != "nan"  # tanh of infinity is one
    assert finite_map or solution.status[1] == ti.Status.NONFINITE
    assert solution.converged[others].all()
    torch.testing.assert_close(solution.value[others], whole.value[others], rtol=1e-7, atol=1e-9)
    got = dict(zip(tensors, gradients(solution, tensors, cotangent)))
    for which in ("x", "p"):
        torch.testing.assert_close(got[which][others], good[which][others], rtol=1e-6, atol=1e-8)
