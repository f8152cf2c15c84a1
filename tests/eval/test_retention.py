import math
import random
from collections.abc import Callable

import pytest

from solera_core.errors import DataError
from solera_eval.records import Results
from solera_eval.retention import churn, retention

MakeResults = Callable[..., Results]


def nlls(level: float, noise: float = 0.0, seed: int = 0, n: int = 30) -> list[tuple[float, int]]:
    draw, sizes = random.Random(seed), random.Random(1)
    return [((level + noise * draw.gauss(0, 1)) * t, t) for t in (sizes.randrange(50, 150) for _ in range(n))]


def three(make: MakeResults, model: float, specialist: float = 2.0, noise: float = 0.02) -> tuple[Results, ...]:
    return (
        make("base", {"t": nlls(3.0)}),
        make("specialist", {"t": nlls(specialist, noise, 1)}),
        make("model", {"t": nlls(model, noise, 2)}),
    )


@pytest.mark.parametrize(("model", "share"), [(2.0, 1.0), (3.0, 0.0), (2.3, 0.7), (3.5, -0.5), (1.9, 1.1)])
def test_retention_is_the_share_of_the_gain(make_results: MakeResults, model: float, share: float) -> None:
    kept = retention(*three(make_results, model), domain="d")
    assert kept.kept is not None
    assert kept.kept == pytest.approx(share, abs=0.02)
    assert kept.low is not None
    assert kept.high is not None
    assert kept.low < kept.kept < kept.high
    assert kept.low < share < kept.high
    assert kept.gain == pytest.approx(1.0, abs=0.02)
    assert kept.documents == 30


def test_the_ends_are_exact(make_results: MakeResults) -> None:
    base, specialist, _ = three(make_results, 2.5)
    assert retention(base, specialist, specialist, domain="d").kept == 1.0
    nothing = retention(base, specialist, base, domain="d")
    assert (nothing.kept, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_no_gain_no_share(make_results: MakeResults) -> None:
    worse = retention(*three(make_results, 2.5, specialist=3.2), domain="d")
    assert (worse.kept, worse.low, worse.high) == (None, None, None)
    assert worse.reason == "the specialist is not better than the base on this domain"
    doubtful = retention(*three(make_results, 2.5, specialist=2.99, noise=0.5), domain="d")
    assert (doubtful.low, doubtful.high) == (None, None)
    assert doubtful.reason is not None


def test_domains_are_kept_apart(make_results: MakeResults) -> None:
    base, specialist, model = three(make_results, 2.5)
    with pytest.raises(DataError, match="no item of domain 'other'"):
        retention(base, specialist, model, domain="other")
    with pytest.raises(DataError, match="without a partner: t/i29"):
        retention(base, specialist, make_results("short", {"t": nlls(2.0, n=29)}), domain="d")


def test_a_domain_without_text_is_compared_by_its_answers(make_results: MakeResults) -> None:
    """By hand: of 40 items the base gets 10 right, the specialist 30, the model 20: half of the gain is kept."""
    base = make_results("base", {"t": [1] * 10 + [0] * 30})
    specialist = make_results("specialist", {"t": [1] * 30 + [0] * 10})
    model = make_results("model", {"t": [1] * 20 + [0] * 20})
    kept = retention(base, specialist, model, domain="d")
    assert (kept.kept, kept.gain, kept.documents, kept.measured_on) == (0.5, 0.5, 40, "answers")
    assert kept.low is not None
    assert kept.high is not None
    assert 0 < kept.low < 0.5 < kept.high < 1
    both = {"t": nlls(3.0), "u": [1] * 30}
    assert retention(*(make_results(n, both) for n in "bsm"), domain="d").measured_on == "text"


def test_churn_shows_what_equal_accuracy_hides(make_results: MakeResults) -> None:
    before = make_results("before", {"t": [1, 1, 1, 0, 0, 0, 1, 0]})
    after = make_results("after", {"t": [1, 0, 0, 1, 0, 0, 1, 0]})
    found = churn(before, after, task="t")
    assert (found.lost, found.gained, found.kept, found.never) == (2, 1, 2, 3)
    assert found.changed == found.to_json()["changed"] == 3 / 8
    with pytest.raises(DataError, match="no choice or generate task"):
        churn(before, after, task="u")
    with pytest.raises(DataError, match="without a partner"):
        churn(before, make_results("more", {"t": [1] * 9}), task="t")


def test_one_document_gives_a_share_without_interval(make_results: MakeResults) -> None:
    results = (make_results("b", {"t": [(30.0, 10)]}), make_results("s", {"t": [(20.0, 10)]}))
    kept = retention(*results, make_results("m", {"t": [(25.0, 10)]}), domain="d")
    assert (kept.kept, kept.low, kept.gain_low) == (0.5, None, None)
    assert math.isfinite(kept.gain)
