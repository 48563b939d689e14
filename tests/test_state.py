from __future__ import annotations

import pytest
import torch

from torchimplicit.state import Layout, detached, row_norm


def tree():
    return {"a": torch.arange(12.0).reshape(2, 2, 3), "b": [torch.ones(2, 1), (torch.zeros(2, 0),)]}


def test_a_tree_there_and_back():
    layout = Layout.of(tree(), batched=True)
    flat = layout.flatten(tree(), "z")
    assert flat.shape == (2, layout.dim) == (2, 7)
    torch.testing.assert_close(layout.unflatten(flat), tree())


def test_another_batch_size_fits():
    layout = Layout.of(tree(), batched=True)
    assert layout.unflatten(torch.zeros(5, 7))["a"].shape == (5, 2, 3)


def test_a_state_that_is_one_system():
    layout = Layout.of((torch.ones(2, 3), torch.tensor(4.0)), batched=False)
    flat = layout.flatten((torch.ones(2, 3), torch.tensor(4.0)), "z")
    assert flat.tolist() == [[1.0] * 6 + [4.0]]
    assert layout.unflatten(flat)[1].shape == ()


def test_a_flat_state_is_not_copied():
    z = torch.randn(3, 4)
    layout = Layout.of(z, batched=True)
    assert layout.flatten(z, "z") is z
    assert layout.unflatten(z) is z


def test_an_empty_batch():
    layout = Layout.of(torch.zeros(0, 2, 3), batched=True)
    assert layout.flatten(torch.zeros(0, 2, 3), "z").shape == (0, 6)


@pytest.mark.parametrize(
    ("z0", "error", "words"),
    [
        ([], ValueError, "z0 holds no tensors: give"),
        (3.0, TypeError, "z0 must be a tensor or a pytree of tensors, but it holds float"),
        ({"a": torch.ones(2, 3), "b": None}, TypeError, "it holds NoneType"),
        (torch.ones(4), ValueError, r"shape \(4,\), but dim 0 is the batch.*z0\[None\].*z0\[:, None\].*batched=False"),
        (torch.tensor(1.0), ValueError, "dim 0 is the batch"),
        (torch.ones(2, 3, dtype=torch.int64), ValueError, r"dtype torch.int64: .*floating dtype.*z0\.float\(\)"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, "dtype torch.bool"),
        ([torch.ones(2, 3), torch.ones(3, 3)], ValueError, r"different batch sizes \[2, 3\].*batched=False"),
        ([torch.ones(2, 3), torch.ones(2, 3).double()], ValueError, "differ in dtype or device.*convert"),
        ([torch.ones(2, 3), torch.ones(2, 3, device="meta")], ValueError, "differ in dtype or device"),
    ],
)
def test_refuses_a_state(z0, error, words):
    with pytest.raises(error, match=words):
        Layout.of(z0, batched=True)


def test_half_precision_norms_are_taken_in_float32():
    v = torch.full((2, 1000), 100.0, dtype=torch.float16)  # the square of a norm overflows float16
    assert row_norm(v).dtype == torch.float32
    torch.testing.assert_close(row_norm(v), torch.full((2,), 100.0 * 1000**0.5))


def test_detached():
    x = torch.ones(2, requires_grad=True)
    out = detached({"a": 2 * x, "b": [3]})
    assert not out["a"].requires_grad
    assert out["b"] == [3]
