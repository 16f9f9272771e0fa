"""Every second of a run counts once, for the innermost span."""

import time

import pytest

from rtd_jax.train.clock import Clock


def test_a_second_counts_for_the_innermost_span(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()
    now[0] = 5.0  # nobody's
    with clock.span("updates"):
        now[0] = 7.0
        with clock.span("validation"):
            now[0] = 10.0
        now[0] = 11.0

    def stopped() -> None:
        with clock.span("updates"):
            now[0] = 12.0
            raise ValueError("a run that stops")

    with pytest.raises(ValueError, match="a run that stops"):
        stopped()
    now[0] = 20.0
    assert clock.seconds() == {"updates": 4.0, "validation": 3.0}
