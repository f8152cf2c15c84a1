"""Figures as cards and reports show them, and the means over domains."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from solera.results import (
    TaskResult,
    format_bytes,
    format_count,
    format_interval,
    format_value,
    mean_by_metric,
    overlap,
    read_results,
)
from solera_core.errors import DataError


def task(
    value: float, low: float | None = None, high: float | None = None, metric: str = "perplexity", name: str = "a"
) -> TaskResult:
    return TaskResult(name, name, "text", metric, value, low, high, 10)


def test_reading_what_an_evaluation_writes(results_of: Any, tmp_path: Path) -> None:
    found = read_results(results_of(tmp_path / "r", "blake3:1", 4.0, active=100))
    assert (found.total, found.active, found.bytes, found.suite, found.digest) == (
        12345,
        100,
        49380,
        "tiny",
        "blake3:1",
    )
    assert [(t.name, t.domain, t.metric, t.value, t.n) for t in found.tasks] == [
        ("held-out", "prose", "perplexity", 4.0, 80),
        ("pairs", "grammar", "accuracy", 0.715, 400),
    ]
    assert found.tasks[0].extra == {"bits_per_byte": 1.0}
    assert read_results(tmp_path / "r" / "results.json") == found


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {}, "tasks": []}', '{"model": {"ref": "a"}, "tasks": [{"name": 1}]}']
)
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=r"results\.json: not"):
        read_results(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_results(tmp_path / "absent")


def test_a_task_without_domain_or_interval(tmp_path: Path) -> None:
    row = {
        "name": "x",
        "kind": "text",
        "domain": None,
        "metric": "perplexity",
        "value": 3,
        "low": None,
        "high": None,
        "n": 1,
    }
    (tmp_path / "results.json").write_text(json.dumps({"model": {"ref": "m"}, "tasks": [row]}))
    found = read_results(tmp_path).tasks[0]
    assert (found.domain, found.low, found.high) == ("x", None, None)


def test_mean_of_perplexities_is_geometric_by_hand() -> None:
    mean = mean_by_metric([task(2.0, 1.0, 4.0), task(8.0, 4.0, 16.0)])["perplexity"]
    assert mean.value == pytest.approx(4.0)
    # each half-width is log 2; together sqrt(2) log 2 / 2
    assert mean.high == pytest.approx(4 * 2 ** (math.sqrt(2) / 2))
    assert mean.low == pytest.approx(4 / 2 ** (math.sqrt(2) / 2))
    assert mean.tasks == 2


def test_mean_of_shares_is_arithmetic_and_metrics_stay_apart() -> None:
    means = mean_by_metric([task(0.5, 0.4, 0.6, "accuracy"), task(0.7, 0.6, 0.8, "accuracy"), task(9.0)])
    assert means["accuracy"].value == pytest.approx(0.6)
    assert means["accuracy"].low == pytest.approx(0.6 - 0.1 * math.sqrt(2) / 2)
    assert means["perplexity"].value == pytest.approx(9.0)
    assert means["perplexity"].low is None


def test_a_mean_of_one_is_itself_and_what_is_not_finite_is_left_out() -> None:
    mean = mean_by_metric([task(5.0, 4.0, 6.0), task(math.inf), task(math.nan)])["perplexity"]
    assert [mean.value, mean.low, mean.high] == pytest.approx([5, 4, 6])
    assert mean.tasks == 1
    assert mean_by_metric([]) == {}


def test_overlap() -> None:
    assert overlap(task(1, 0, 2), task(3, 2, 4))
    assert not overlap(task(1, 0, 1.9), task(3, 2, 4))
    assert not overlap(task(1), task(3))
    assert overlap(task(3), task(3))


@pytest.mark.parametrize(
    ("value", "metric", "expected"),
    [
        (4.8917, "perplexity", "4.892"),
        (128.43, "perplexity", "128.4"),
        (12345.6, "perplexity", "12346"),
        (0.97314, "bits_per_byte", "0.9731"),
        (0.0123456, "x", "0.01235"),
        (1.5e9, "perplexity", "1.500e+09"),
        (0, "x", "0"),
        (0.71549, "accuracy", "71.5%"),
        (math.inf, "perplexity", "not finite"),
    ],
)
def test_values(value: float, metric: str, expected: str) -> None:
    assert format_value(value, metric) == expected


def test_intervals_counts_and_bytes() -> None:
    assert format_interval(4.81, 4.97, "perplexity") == "4.810–4.970"
    assert format_interval(-0.05, 0.1, "accuracy") == "-5.0% to 10.0%"
    assert format_interval(None, 1.0) == ""
    assert [format_count(n) for n in (None, 0, 999, 1000, 260032, 999_600, 7_615_616_512)] == [
        "",
        "0",
        "999",
        "1k",
        "260k",
        "1M",
        "7.62B",
    ]
    assert [format_bytes(n) for n in (None, 12, 49_380, 15_231_000_000)] == ["", "12 B", "49.4 kB", "15.2 GB"]
