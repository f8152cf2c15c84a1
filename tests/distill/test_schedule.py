"""The learning rate by hand."""

import pytest

from solera_distill.schedule import Schedule, rate


@pytest.mark.parametrize(
    "schedule, middle, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_by_hand(schedule: Schedule, middle: float, end: float) -> None:
    def at(progress: float) -> float:
        return rate(progress, schedule=schedule, warmup=0.2, final=0.1)

    assert at(0.05) == pytest.approx(0.25)
    assert at(0.2) == pytest.approx(1.0)
    assert at(0.6) == pytest.approx(middle)
    assert at(1.0) == pytest.approx(end)


def test_without_warmup_the_first_step_is_near_the_peak() -> None:
    assert rate(0.001, schedule="cosine", warmup=0.0, final=0.0) == pytest.approx(1.0, abs=1e-4)
