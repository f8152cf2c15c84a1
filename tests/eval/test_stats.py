import math
from functools import cache

import numpy as np
import pytest

from solera_eval.stats import (
    RatioEstimate,
    documents_needed,
    fieller_interval,
    items_needed_above,
    normal_quantile,
    paired_items_needed,
    perplexity,
    ratio_of_sums,
    t_quantile,
    tango_interval,
    tango_lower,
    tango_statistic,
    tango_upper,
    wilson_interval,
    wilson_lower,
)

NOMINAL = 0.05


def test_quantiles_are_the_tabulated_ones() -> None:
    assert normal_quantile(0.95) == pytest.approx(1.6449, abs=1e-4)
    assert normal_quantile(0.975) == pytest.approx(1.9600, abs=1e-4)
    assert t_quantile(0.975, 10) == pytest.approx(2.2281, abs=1e-4)
    assert t_quantile(0.95, 1) == pytest.approx(6.3138, abs=1e-4)


# Wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Two-sided confidence intervals for the single proportion, Statistics in Medicine 17:857-872
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_are_exact_at_the_ends() -> None:
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


def test_wilson_bound_inverts_the_score_test() -> None:
    bound = wilson_lower(70, 100, 0.95)
    assert (0.7 - bound) / math.sqrt(bound * (1 - bound) / 100) == pytest.approx(normal_quantile(0.95))


def test_items_needed_above_has_the_power_it_promises() -> None:
    n = items_needed_above(0.6, 0.52)
    assert n is not None
    rng = np.random.default_rng(7)
    shown = [wilson_lower(int(k), n) > 0.52 for k in rng.binomial(n, 0.6, 4000)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)
    assert items_needed_above(0.5, 0.52) is None


# Tango


def test_tango_interval_equals_the_published_example() -> None:
    # Airway hyper-responsiveness before and after transplantation, 21 children: 1 before only, 7 after only;
    # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33:2850-2875: -0.286 (-0.517 to -0.026)
    assert tango_interval(lost=7, gained=1, n=21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("n", "bound"), [(10, -0.213), (164, -0.0162), (1000, -0.0027)])
def test_tango_without_discordant_pairs_still_allows_a_loss(n: int, bound: float) -> None:
    z = normal_quantile(0.95)
    assert tango_lower(0, 0, n) == pytest.approx(-z * z / (n + z * z), abs=1e-12)
    assert tango_lower(0, 0, n) == pytest.approx(bound, abs=5e-4)


def test_tango_at_zero_is_mcnemar() -> None:
    assert tango_statistic(12, 5, 200, 0.0) == pytest.approx((5 - 12) / math.sqrt(17))


@pytest.mark.parametrize(("lost", "gained", "n", "difference"), [(7, 1, 21, -0.1), (3, 9, 40, -0.05), (0, 4, 30, 0.2)])
def test_tango_nuisance_parameter_maximises_the_likelihood(lost: int, gained: int, n: int, difference: float) -> None:
    grid = np.linspace(max(0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 400_001)
    likelihood = (n - lost - gained) * np.log(1 - 2 * grid - difference)
    likelihood += lost * np.log(grid) if lost else 0
    likelihood += gained * np.log(grid + difference) if gained else 0
    q = grid[np.argmax(likelihood)]
    expected = (gained - lost - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))
    assert tango_statistic(lost, gained, n, difference) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 5), (3, 1, 10), (10, 0, 10), (0, 10, 10), (50, 80, 1000)])
def test_tango_bounds_mirror_contain_and_nest(lost: int, gained: int, n: int) -> None:
    low, high = tango_interval(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    mirrored = tango_interval(gained, lost, n)
    assert mirrored == (-high, -low)
    assert tango_lower(lost, gained, n, 0.95) >= low
    assert tango_lower(lost, gained, n, 0.8) >= tango_lower(lost, gained, n, 0.99)
    assert tango_upper(lost, gained, n, 0.9) <= tango_upper(lost, gained, n, 0.99)


@pytest.mark.parametrize("counts", [(3, 3, 5), (-1, 0, 5), (0, 0, 0)])
def test_impossible_counts_are_our_bugs(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="of"):
        tango_statistic(*counts, 0.0)


@cache
def _passes(lost: int, gained: int, n: int, margin: float) -> bool:
    return tango_lower(lost, gained, n, 1 - NOMINAL) > -margin


def _pass_rate(n: int, margin: float, lost: float, gained: float, draws: int = 20_000) -> float:
    rng = np.random.default_rng(1998)
    counts = rng.multinomial(n, [lost, gained, 1 - lost - gained], size=draws)
    return float(np.mean([_passes(int(a), int(b), n, margin) for a, b, _ in counts]))


@pytest.mark.parametrize(
    ("n", "margin", "discordant", "false_pass", "power"),
    # nominal 5 %; anchors of an independent simulation, 20,000 draws each
    [
        (100, 0.02, 0.04, 0.043, 0.22),
        (300, 0.02, 0.04, 0.046, 0.48),
        (1000, 0.02, 0.04, 0.050, 0.92),
        (1000, 0.01, 0.12, 0.047, 0.23),
    ],
)
def test_false_pass_rate_holds_its_nominal_level(
    n: int, margin: float, discordant: float, false_pass: float, power: float
) -> None:
    error = math.sqrt(NOMINAL * (1 - NOMINAL) / 20_000)
    rate = _pass_rate(n, margin, (discordant + margin) / 2, (discordant - margin) / 2)
    assert rate <= NOMINAL + 3 * error
    assert rate == pytest.approx(false_pass, abs=0.006)
    assert _pass_rate(n, margin, discordant / 2, discordant / 2) == pytest.approx(power, abs=0.015)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "margin"), [(10, 8, 400, 0.02), (30, 12, 400, 0.02), (3, 3, 150, 0.03)]
)
def test_paired_items_needed_has_the_power_it_promises(lost: int, gained: int, n: int, margin: float) -> None:
    needed = paired_items_needed(lost, gained, n, margin=margin)
    assert needed is not None
    rng = np.random.default_rng(3)
    rates = [lost / n, gained / n, 1 - (lost + gained) / n]
    fails = (gained - lost) / n < -margin
    decided = [
        tango_upper(int(a), int(b), needed) < -margin if fails else tango_lower(int(a), int(b), needed) > -margin
        for a, b, _ in rng.multinomial(needed, rates, size=2000)
    ]
    assert np.mean(decided) == pytest.approx(0.8, abs=0.06)  # the formula is asymptotic too


def test_paired_items_needed_without_discordant_pairs_inverts_the_bound() -> None:
    assert paired_items_needed(0, 0, 10, margin=0.02) == 133
    assert tango_lower(0, 0, 133) > -0.02 > tango_lower(0, 0, 132)


def test_no_number_settles_a_difference_at_the_margin() -> None:
    assert paired_items_needed(4, 2, 100, margin=0.02) is None


# perplexity ratios


def test_ratio_of_sums_by_hand() -> None:
    # R = 6/4; residuals 1 - 1.5 and 5 - 4.5; over 1 - 1/4 and 1 - 3/4: -2/3 and 2; se = sqrt(4/9 + 4) / 4
    estimate = ratio_of_sums([1.0, 5.0], [1, 3])
    assert (estimate.value, estimate.clusters) == (1.5, 2)
    assert estimate.standard_error == pytest.approx(math.sqrt(40 / 9) / 4)
    low, high = estimate.bounds(0.95)
    assert high - 1.5 == pytest.approx(12.706 * estimate.standard_error, rel=1e-4)
    assert 1.5 - low == pytest.approx(high - 1.5)


def test_equal_sizes_give_the_standard_error_of_a_mean_a_little_wider() -> None:
    values = [0.3, 0.1, -0.4, 0.9, 0.2]
    estimate = ratio_of_sums(values, [1] * 5)
    assert estimate.value == pytest.approx(np.mean(values))
    ordinary = np.std(values, ddof=1) / math.sqrt(5)
    assert estimate.standard_error == pytest.approx(ordinary * math.sqrt(5 / 4))  # HC3 against HC1


def test_a_document_that_holds_everything_gives_no_certainty() -> None:
    assert ratio_of_sums([3.0, 0.0], [5, 0]).upper() == math.inf


def test_one_document_has_no_interval() -> None:
    estimate = ratio_of_sums([2.0], [4])
    assert estimate.bounds() == (-math.inf, math.inf)
    assert documents_needed(estimate, margin=1.05) is None


def test_identical_scores_give_ratio_one_without_error() -> None:
    estimate = ratio_of_sums([0.0] * 8, list(range(1, 9)))
    assert (math.exp(estimate.upper()), estimate.standard_error) == (1.0, 0.0)


def _log_ratio(rng: np.random.Generator, documents: int, true: float) -> RatioEstimate:
    """Documents of very different lengths; within one, tokens share an effect."""
    tokens = np.ceil(rng.lognormal(4, 0.7, documents))
    effects = true + rng.normal(0, 0.05, documents) + rng.normal(0, 1, documents) * 0.5 / np.sqrt(tokens)
    return ratio_of_sums(list(effects * tokens), list(tokens))


@pytest.mark.parametrize("documents", [20, 60])
def test_false_pass_rate_of_the_perplexity_bound(documents: int) -> None:
    rng = np.random.default_rng(2411)
    margin, draws = 1.05, 4000
    passes = [math.exp(_log_ratio(rng, documents, math.log(margin)).upper(1 - NOMINAL)) < margin for _ in range(draws)]
    assert np.mean(passes) <= NOMINAL + 3 * math.sqrt(NOMINAL * (1 - NOMINAL) / draws)
    assert np.mean(passes) >= NOMINAL / 2  # nor so careful that nothing passes


def test_documents_needed_has_the_power_it_promises() -> None:
    rng = np.random.default_rng(5)
    true, margin = math.log(1.02), 1.05
    seen = _log_ratio(rng, 400, true)
    needed = documents_needed(RatioEstimate(true, seen.standard_error, 400), margin=margin)
    assert needed is not None
    passes = [math.exp(_log_ratio(rng, needed, true).upper()) < margin for _ in range(1500)]
    assert np.mean(passes) == pytest.approx(0.8, abs=0.06)


def test_perplexity_is_finite() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e6))


# shares of a gain


def test_fieller_is_the_interval_of_a_mean_for_a_certain_denominator() -> None:
    numerators, denominators = [0.4, 0.6, 0.55, 0.45, 0.5, 0.52], [1.0] * 6
    reach = t_quantile(0.975, 5) * np.std(numerators, ddof=1) / math.sqrt(6)
    mean = np.mean(numerators)
    assert fieller_interval(numerators, denominators) == pytest.approx((mean - reach, mean + reach))


def test_fieller_refuses_a_denominator_that_may_be_zero() -> None:
    assert fieller_interval([1.0, 2.0, 1.5], [0.1, -0.1, 0.05]) is None
    assert fieller_interval([1.0], [1.0]) is None


def test_fieller_covers_the_true_share() -> None:
    rng = np.random.default_rng(1954)
    draws, covered = 3000, 0
    for _ in range(draws):
        tokens = np.ceil(rng.lognormal(4, 0.5, 25))
        gains = tokens * (0.3 + rng.normal(0, 0.15, 25))
        kept = 0.7 * gains + tokens * rng.normal(0, 0.05, 25)
        interval = fieller_interval(list(kept), list(gains))
        assert interval is not None
        covered += interval[0] <= 0.7 <= interval[1]
    assert covered / draws == pytest.approx(0.95, abs=0.02)
