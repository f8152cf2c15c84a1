"""report.html: parseable, self-contained, everything escaped, every number of the run on it, whatever is missing."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from solera.report import (
    ModelSummary,
    Retention,
    RunSummary,
    StageSummary,
    moe_worth,
    text_table,
    verdict_sentence,
    write_report,
)
from solera.results import TaskResult

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags balanced, attributes and text collected."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunSummary, path: Path) -> tuple[str, Page]:
    write_report(run, path)
    source = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    return source, page


def text_task(name: str, value: float, n: int = 80) -> TaskResult:
    return TaskResult(
        f"{name}-held-out",
        name,
        "text",
        "perplexity",
        value,
        value * 0.97,
        value * 1.04,
        n,
        {"bits_per_byte": value / 7},
    )


def choice_task(value: float) -> TaskResult:
    return TaskResult("sums", "arithmetic", "generate", "exact_match", value, value - 0.05, value + 0.04, 213)


@pytest.fixture
def run() -> RunSummary:
    sizes = {"base": 1_000_000, "code": 1_000_000, "moe": 2_900_000, "control": 1_000_000, "student": 600_000}
    kinds = {"base": "init", "code": "tune", "moe": "moe", "control": "distill", "student": "distill"}
    values = {
        "base": (9.13, 8.47, 0.11),
        "code": (4.02, 9.31, 0.12),
        "moe": (4.31, 5.22, 0.71),
        "control": (5.9, 6.17, 0.52),
        "student": (4.55, 5.48, 0.66),
    }
    kept = (("moe", "code", 0.943), ("moe", "prose", 1.021), ("student", "code", 0.387), ("student", "prose", -0.114))
    return RunSummary(
        title="demo run",
        stages=[
            StageSummary("base", "init", (), False, 14.3, "blake3:" + "ab" * 32),
            StageSummary("code", "tune", ("base",), True, 31.7, "blake3:" + "cd" * 32),
            StageSummary("moe", "moe", ("base", "code"), False, 9.1, "blake3:" + "ef" * 32),
            StageSummary("student", "distill", ("moe", "org/teacher"), False, 44.9, "blake3:" + "01" * 32),
            StageSummary("release", "publish", ("student",), False, 0.0, "", "held back: verdict says FAIL"),
        ],
        models=[ModelSummary(m, kinds[m], n, 1_700_000 if m == "moe" else n, n * 4) for m, n in sizes.items()],
        results={m: [text_task("code", a), text_task("prose", b), choice_task(c)] for m, (a, b, c) in values.items()},
        retention=[Retention(m, d, s, s - 0.07, s + 0.06) for m, d, s in kept],
        verdict={
            "verdict": "FAIL",
            "candidate": "student",
            "baseline": "moe",
            "policy": {},
            "tasks": [
                {"name": "code-held-out", "metric": "perplexity", "tier": "critical", "n": 80, "baseline": 4.31,
                 "candidate": 4.55, "ratio": 1.0557, "low": 1.04, "high": 1.07, "bound": 1.0713, "margin": 1.05,
                 "verdict": "FAIL", "n_needed": None, "lost": None, "gained": None, "reasons": []},
                {"name": "sums", "metric": "exact_match", "tier": "advisory", "n": 213, "baseline": 0.71,
                 "candidate": 0.66, "difference": -0.05, "low": -0.09, "high": -0.01, "bound": -0.0912, "margin": 0.02,
                 "verdict": "INCONCLUSIVE", "n_needed": 1817, "lost": 19, "gained": 8, "reasons": []},
            ],
            "reasons": ["code-held-out: the ratio is above its margin"],
        },
        notes=["Publishing was held back."],
        recipe="solera: 1\nstages:\n  base: {init: {}}\n",
        environment={"solera": "0.1.0", "torch": "2.13.0"},
        moe="moe",
        control="control",
    )  # fmt: skip


def test_the_verdict_comes_first(run: RunSummary, tmp_path: Path) -> None:
    _, page = page_of(run, tmp_path / "report.html")
    text = " ".join(page.text[page.text.index("demo run", 20) :].split())
    assert re.match(
        r".*?demo run FAIL ?student is worse than moe by more than the margin on the one task: code-held-out", text
    )
    assert "ratio 1.0557, bound 1.0713, margin 1.05" in text


def test_nothing_is_loaded_from_anywhere(run: RunSummary, tmp_path: Path) -> None:
    source, page = page_of(replace(run, notes=["see https://example.org/x.js"]), tmp_path / "report.html")
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    assert [a for a in page.attributes if a[0] in loading] == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "use", "image", "base", "form"} & set(page.tags)
    assert not [value for key, value in page.attributes if key.startswith("on")]
    css = "".join(re.findall(r"<style>(.*?)</style>", source, re.S)) + " ".join(
        v for k, v in page.attributes if k == "style"
    )
    assert "@import" not in css
    assert "url(" not in css
    assert source.count("http") == source.count("http-equiv") + source.count("https://example.org/x.js")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_every_number_is_on_the_page(run: RunSummary, tmp_path: Path) -> None:
    _, page = page_of(run, tmp_path / "report.html")
    words = page.text
    for tasks in run.results.values():
        for t in tasks:
            for value in (t.value, t.low, t.high):
                assert f"{value:.6g}" in words
            assert str(t.n) in words
    for row in run.retention:
        assert f"{100 * row.share:.1f}%" in words
        assert f"{100 * (row.low or 0):.1f}%" in words
    for shown in (
        "1M",
        "2.9M",
        "1.7M active",
        "11.6 MB",
        "600k",
        "2.4 MB",
        "1817",
        "19 lost, 8 gained",
        "-0.0912",
        "14.3",
        "31.7",
        "44.9",
        "2.13.0",
    ):
        assert shown in words, shown
    for stage in run.stages:
        assert stage.digest[:20] in words
    assert run.recipe.strip() in words
    assert "held back: verdict says FAIL" in words


def test_hostile_text_stays_text(run: RunSummary, tmp_path: Path) -> None:
    bad = "</td></svg></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
    hostile = RunSummary(
        title=bad,
        stages=[StageSummary(bad, bad, (bad + "2",), False, 1.0, bad, bad)],
        models=[ModelSummary(bad, bad, 10, 5, 20), ModelSummary("other", bad, 10, 5, 10)],
        results={
            bad: [TaskResult(bad, bad, "text", bad, 1.0, 0.5, 2.0, 3, {bad: 1.0})],
            "other": [TaskResult(bad, bad, "text", bad, 2.0, 0.5, 2.0, 3)],
        },
        retention=[Retention(bad, bad, 0.5, 0.4, 0.6)],
        verdict={
            "verdict": "PASS",
            "candidate": bad,
            "baseline": bad,
            "tasks": [{"name": bad, "metric": bad, "verdict": bad, "tier": bad}],
            "reasons": [bad],
        },
        notes=[bad],
        recipe=bad,
        environment={bad: bad},
        moe=bad,
        control="other",
        retention_of=bad,
    )  # fmt: skip
    source, page = page_of(hostile, tmp_path / "report.html")
    assert "<script" not in source
    assert "<img" not in source
    assert source.count("</style>") == 1
    assert "script" not in page.tags
    assert bad in page.text
    assert html.escape(bad, quote=False) not in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": None},
        {"retention": []},
        {"moe": None},
        {"control": "absent"},
        {"stages": []},
        {"recipe": "", "environment": {}, "notes": []},
        {"results": {}},
        {"models": [], "results": {}},
    ],
)
def test_what_is_missing_is_left_out(run: RunSummary, change: dict[str, Any], tmp_path: Path) -> None:
    fewer = replace(run, **change)
    source, page = page_of(fewer, tmp_path / "report.html")
    assert ("No verdict" in page.text) == (fewer.verdict is None)
    assert ("What is kept" in page.text) == bool(fewer.retention)
    assert ("Is the mixture worth" in page.text) == (
        "moe" not in change and "control" not in change and bool(fewer.results)
    )
    assert ("Lineage" in page.text) == bool(fewer.stages)
    assert ("Recipe" in page.text) == bool(fewer.recipe)
    assert "None" not in page.text
    assert "nan" not in source
    assert text_table(fewer)


def test_an_empty_run_and_a_single_model(tmp_path: Path) -> None:
    page_of(RunSummary(), tmp_path / "empty.html")
    one = RunSummary(
        models=[ModelSummary("solo", "merge", 7_615_616_512, None, None)], results={"solo": [text_task("wiki", 5.31)]}
    )
    source, page = page_of(one, tmp_path / "one.html")
    assert "7.62B" in page.text
    assert "<svg" not in source, "one point is no plot"


def test_a_model_measured_on_fewer_tasks_has_no_mean(run: RunSummary, tmp_path: Path) -> None:
    results = {**run.results, "code": run.results["code"][:1]}
    _, page = page_of(replace(run, results=results), tmp_path / "report.html")
    assert "Not drawn, because not measured on every task: code." in page.text


def test_values_that_are_not_finite_are_shown_as_such(run: RunSummary, tmp_path: Path) -> None:
    bad = replace(run.results["moe"][0], value=float("inf"), low=None, high=None)
    _, page = page_of(
        replace(run, results={**run.results, "moe": [bad, *run.results["moe"][1:]]}), tmp_path / "report.html"
    )
    assert "not finite" in page.text


def test_writing_replaces_in_one_step_and_is_the_same_each_time(run: RunSummary, tmp_path: Path) -> None:
    first, _ = page_of(run, tmp_path / "report.html")
    second, _ = page_of(run, tmp_path / "report.html")
    assert first == second
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# sentences -----------------------------------------------------------------------------------------------------------


def judged(*outcomes: str, verdict: str) -> dict[str, Any]:
    tasks = [
        {"name": f"t{i}", "metric": "accuracy", "candidate": 0.7, "baseline": 0.71, "difference": -0.01,
         "bound": -0.015 + 0.001 * i, "margin": 0.02, "n": 300, "verdict": o, "n_needed": 900}
        for i, o in enumerate(outcomes)
    ]  # fmt: skip
    return {"verdict": verdict, "candidate": "student", "baseline": "moe", "tasks": tasks, "reasons": []}


def test_a_pass_names_the_task_closest_to_its_limit() -> None:
    sentence = verdict_sentence(judged("PASS", "PASS", verdict="PASS"))
    assert sentence == (
        "student keeps the quality of moe within the margin on all 2 tasks; closest to its limit is t0: accuracy 70.0% "
        "against 71.0% (difference -0.0100, bound -0.0150, margin -0.02)."
    )


def test_inconclusive_says_how_many_items_are_needed() -> None:
    sentence = verdict_sentence(judged("PASS", "INCONCLUSIVE", verdict="INCONCLUSIVE"))
    assert sentence.startswith(
        "The data cannot tell whether student keeps the quality of moe: open on 1 of 2 tasks: t1"
    )
    assert "300 items, about 900 needed" in sentence


def test_many_failures_are_counted_not_listed() -> None:
    sentence = verdict_sentence(judged(*["FAIL"] * 5, verdict="FAIL"))
    assert sentence.startswith("student is worse than moe by more than the margin on 5 of 5 tasks: t0")
    assert sentence.endswith("(and 3 more).")


def test_a_verdict_without_tasks_is_still_a_sentence() -> None:
    for verdict in ("PASS", "FAIL", "INCONCLUSIVE"):
        assert verdict_sentence({"verdict": verdict, "candidate": "a", "baseline": "b"}).endswith(".")


def test_is_the_mixture_worth_its_bytes(run: RunSummary) -> None:
    text = " ".join(moe_worth(run))
    assert text.startswith(
        "moe takes 11.6 MB, 2.90 times the 4 MB of control, and uses 1.70 times its parameters for each token."
    )
    assert "Mean perplexity over 2 tasks: 4.743 against 6.033 (21.4% lower, better)." in text
    assert "Mean exact match: 71.0% against 52.0% (19.0 points higher, better)." in text
    assert text.endswith(
        "It is better on 3 of 3 tasks with intervals apart, and worse on none: the extra bytes buy quality."
    )


@pytest.mark.parametrize(
    ("moe", "control", "expected"),
    [
        ((5.0, 5.0), (5.0, 5.0), "no gain for the extra bytes"),
        ((9.0, 5.0), (5.0, 5.0), "not worth it"),
        ((9.0, 5.0), (5.0, 9.0), "better on 1 and worse on 1 of 2 tasks"),
        ((5.0, 5.0), (9.0, 5.0), "better on 1 of 2 tasks with intervals apart, and worse on none"),
    ],
)
def test_what_the_mixture_is_said_to_be_worth(
    moe: tuple[float, ...], control: tuple[float, ...], expected: str
) -> None:
    results = {n: [text_task(f"d{i}", x) for i, x in enumerate(v)] for n, v in (("moe", moe), ("control", control))}
    assert expected in moe_worth(RunSummary(results=results, moe="moe", control="control"))[-1]


# the terminal --------------------------------------------------------------------------------------------------------


def test_the_plain_table(run: RunSummary) -> None:
    text = text_table(run)
    assert text.isprintable() or "\x1b" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    row = next(line.split() for line in lines if line.startswith("moe"))
    assert row == ["moe", "2.9M", "1.7M", "11.6", "MB", "4.310", "5.220", "4.743", "71.0%", "98.2%"]
    assert next(line.split()[-1] for line in lines if line.startswith("base")) == "-"
    assert lines[-1].startswith("FAIL: student is worse than moe")
    assert all(line == line.rstrip() for line in lines)


def test_markup_in_names_is_not_obeyed(run: RunSummary) -> None:
    models = [replace(m, name="[red]x[/red]") if m.name == "base" else m for m in run.models]
    results = {("[red]x[/red]" if k == "base" else k): v for k, v in run.results.items()}
    assert "[red]x[/red]" in text_table(replace(run, models=models, results=results))
