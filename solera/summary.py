"""From a finished run to what the report shows: results, sizes, the share kept of every specialist."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from solera.console import stdout_console
from solera.moe_report import Mixture, read_mixture
from solera.pipeline import RunOutcome
from solera.recipe import Recipe
from solera.report import ModelSummary, Retention, RunSummary, StageSummary, rich_table, verdict_sentence, write_report
from solera.results import TaskResult, read_results
from solera_core.errors import DataError
from solera_core.version import __version__
from solera_eval import records
from solera_eval.config import EvalConfig
from solera_eval.retention import retention

__all__ = ["Summary", "evaluated", "summarise"]


@dataclass(frozen=True)
class Summary:
    """A run ready to be shown."""

    run: RunSummary
    outcome: RunOutcome

    def write_report(self, path: Path) -> None:
        """The page."""
        write_report(self.run, path)

    def print_tables(self) -> None:
        """The result table and the verdict, on stdout."""
        console = stdout_console()
        if self.run.results:
            console.print(rich_table(self.run))
        for note in self.run.notes:
            console.print(note, markup=False)
        if self.run.verdict is not None:
            console.print(f"{self.run.verdict['verdict']}: {verdict_sentence(self.run.verdict)}", markup=False)

    def to_json(self) -> dict[str, Any]:
        """The run's summary, results and verdicts."""
        summary: dict[str, Any] = json.loads((self.outcome.out / "run.json").read_text(encoding="utf-8"))
        return summary | {
            "results": {
                m: [t.__dict__ | {"extra": dict(t.extra)} for t in tasks] for m, tasks in self.run.results.items()
            },
            "retention": [r.__dict__ for r in self.run.retention],
            "verdicts": self.outcome.verdicts,
        }


def summarise(recipe: Recipe, outcome: RunOutcome) -> Summary:
    """Gather results of every eval stage of a run; a model evaluated twice keeps its tasks of both."""
    results: dict[str, list[TaskResult]] = {}
    models: dict[str, ModelSummary] = {}
    kinds = {s.name: s.kind for s in outcome.stages}
    for name, directory in evaluated(recipe, outcome):
        measured = read_results(directory)
        results.setdefault(name, []).extend(measured.tasks)
        models[name] = ModelSummary(name, kinds.get(name, "given"), measured.total, measured.active, measured.bytes)
    notes = [f"{s.name} was {s.note}." for s in outcome.stages if s.status == "held back"]
    kept, kept_notes = _retention(recipe, outcome)
    verdict = next((v for v in outcome.verdicts.values() if v["verdict"] == outcome.verdict), None)
    return Summary(
        RunSummary(
            title=recipe.title or "solera run",
            stages=[
                StageSummary(s.name, s.kind, s.inputs, s.status == "cached", s.seconds, s.digest, s.note)
                for s in outcome.stages
            ],
            models=list(models.values()),
            results=results,
            retention=kept,
            verdict=verdict,
            notes=[*notes, *outcome.notes, *kept_notes],
            recipe=yaml.safe_dump(dict(recipe.source), sort_keys=False),
            environment=_environment(),
            moe=recipe.report.moe,
            control=recipe.report.control,
            mixtures=_mixtures(outcome),
        ),
        outcome,
    )


def _mixtures(outcome: RunOutcome) -> list[Mixture]:
    """The MoEs that the run made, where they have a report."""
    made = [s for s in outcome.stages if s.kind == "moe" and s.status != "held back"]
    found = [read_mixture(stage.path, stage.name) for stage in made]
    return [mixture for mixture in found if mixture is not None]


def evaluated(recipe: Recipe, outcome: RunOutcome) -> Iterator[tuple[str, Path]]:
    """(model, its results directory) of every eval stage, in the recipe's order of models."""
    for stage in outcome.stages:
        if stage.kind != "eval":
            continue
        config = recipe.stage(stage.name).config
        assert isinstance(config, EvalConfig)
        for name in config.named_models():
            yield name, stage.path if config.model is not None else stage.path / name


def _retention(recipe: Recipe, outcome: RunOutcome) -> tuple[list[Retention], list[str]]:
    """Share kept of every specialist's gain over the base, for every other model, on the specialist's domain."""
    base, specialists = recipe.report.base, recipe.report.specialists
    if base is None or not specialists:
        return [], []
    runs = {name: records.read_results(directory) for name, directory in evaluated(recipe, outcome)}
    kept: list[Retention] = []
    notes: list[str] = []
    for domain, specialist in specialists.items():
        if base not in runs or specialist not in runs:
            notes.append(f"{domain}: no share kept is given, for {base} and {specialist} were not both evaluated.")
            continue
        if not any(record.domain == domain for record in runs[base].items):
            notes.append(f"{domain}: no share kept is given, for no task of {base} has this domain.")
            continue
        for model in runs:
            if model == base:
                continue
            try:
                share = retention(runs[base], runs[specialist], runs[model], domain=domain)
            except DataError:  # a gap in the report, no reason to end without one
                notes.append(f"{domain}: no share kept is given for {model}, which other items were measured on.")
                continue
            if model == specialist and share.measured_on == "answers":
                notes.append(f"{domain}: has no text task; the share kept is that of the answers that became right.")
            if share.kept is not None:
                kept.append(Retention(model, domain, share.kept, share.low, share.high))
            elif model == specialist and share.reason:
                notes.append(f"{domain}: no share kept is given, for {share.reason}.")
    return kept, notes


def _environment() -> dict[str, str]:
    versions = {"solera": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        versions[package] = metadata.version(package)
    return versions | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
