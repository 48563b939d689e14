"""What an estimator of one's own has to fill in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from torchimplicit.gradients import DerivativeRule, FirstOrderRule, Gradient, LinearEstimate


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        (Gradient, {"attach"}),
        (DerivativeRule, {"adjoint", "tangent"}),
        (FirstOrderRule, {"cotangents"}),
        (LinearEstimate, {"apply"}),
    ],
)
def test_what_is_left_out_is_refused_when_the_estimator_is_made(kind, methods):
    assert kind.__abstractmethods__ == methods

    @dataclass(frozen=True, kw_only=True)
    class Incomplete(kind):
        pass

    with pytest.raises(TypeError, match=f"abstract method.*{sorted(methods)[0]}"):
        Incomplete()
