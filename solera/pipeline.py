"""Run a recipe: every stage once, in order, cached by what went in, resumable after a kill.

    OUT/stages/NAME/     what the stage wrote (a checkpoint, or evaluation results)
    OUT/keys/NAME.json   the hash of everything that went into it, and what came out
    OUT/recipe.yml       the recipe as run, OUT/run.json the summary, OUT/report.html the page

A stage is a pure function of its settings, the seed, and the contents of its inputs; its key is their hash. Equal key
and untouched output: the stage is skipped. A stage that fails leaves the earlier ones whole; the next run goes on
from there.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from solera.planning import plan_stages
from solera.preflight import check_inputs
from solera.publish import PublishConfig
from solera.recipe import Recipe
from solera.recipe_dir import write_recipe_dir
from solera.stages import Stage
from solera.workers import start_stage, workers
from solera_core.context import Context
from solera_core.data import DataSource
from solera_core.digest import file_sha256
from solera_core.errors import ConfigError, ResourceError, SoleraError
from solera_core.plan import Plan
from solera_core.route import find_route
from solera_core.staging import disk_errors
from solera_core.version import __version__
from solera_eval.config import EvalConfig

__all__ = ["PlannedStage", "RunOutcome", "StageOutcome", "directory_digest", "plan_run", "run_recipe"]

# Kinds of stage that learn from text.
_TRAINING = ("init", "tune", "distill", "moe", "moe-prune", "moe-merge-experts", "moe-extract-lora", "route")


@dataclass(frozen=True)
class StageOutcome:
    """One finished (or skipped) stage."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    status: str  # made | cached | held back
    seconds: float
    digest: str
    path: Path
    note: str = ""


@dataclass(frozen=True)
class RunOutcome:
    """A finished run."""

    out: Path
    stages: tuple[StageOutcome, ...]
    verdicts: Mapping[str, Mapping[str, Any]]  # eval stage -> its verdict.json
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str | None:
        """The worst verdict of all gates: FAIL, then INCONCLUSIVE, then PASS; None without a gate."""
        found = {v["verdict"] for v in self.verdicts.values()}
        return next((v for v in ("FAIL", "INCONCLUSIVE", "PASS") if v in found), None)


@dataclass(frozen=True)
class PlannedStage:
    """What a stage would do. Sizes of models that are not made yet are those that their own plans give."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    status: str  # cached | run | run (inputs not made yet)
    plan: Plan


def plan_run(recipe: Recipe, out: Path, ctx: Context) -> list[PlannedStage]:
    """Which stages would run, and the plan of every one. Writes nothing.

    Raises:
        SoleraError: as `run_recipe` before its first stage.
    """
    check_inputs(recipe, out, ctx)
    _check_leaks(recipe)
    made: dict[str, Path] = {}
    status: dict[str, str] = {}
    for stage in recipe.stages:
        if any(name not in made for name in recipe.inputs(stage)):
            status[stage.name] = "run (inputs not made yet)"
        elif _current(stage, out, _key(stage, _stage_context(recipe, ctx, made))) is not None:
            made[stage.name] = out / "stages" / stage.name
            status[stage.name] = "cached"
        else:
            status[stage.name] = "run"
    plans = plan_stages(recipe, out, ctx, made=made)
    return [PlannedStage(s.name, s.kind, recipe.inputs(s), status[s.name], plans[s.name]) for s in recipe.stages]


def run_recipe(recipe: Recipe, out: Path, ctx: Context, *, jobs: int = 1) -> RunOutcome:
    """Run every stage that is not current, then write the summary.

    Args:
        recipe: what to run.
        out: the run directory; one that an earlier run of the recipe left is continued.
        ctx: threads, permissions, progress; seed and paths are the recipe's own.
        jobs: stages that do not read each other may run side by side, each in a process of its own.

    Raises:
        ConfigError: what the recipe names is not there, or test text is trained on; nothing is written then.
        SoleraError: the stage's own error, with the stage's name in front; earlier stages, and those that ran beside
            it, stay whole.
    """
    check_inputs(recipe, out, ctx)
    notes = _check_leaks(recipe)
    if not all(_key_file(out, stage.name).exists() for stage in recipe.stages):
        plan_stages(recipe, out, ctx)  # refuses now what would be refused after hours
    with disk_errors(out):
        (out / "keys").mkdir(parents=True, exist_ok=True)
        (out / "recipe.yml").write_text(yaml.safe_dump(dict(recipe.source), sort_keys=False), encoding="utf-8")
        write_recipe_dir(out, recipe.base_dir)
    for note in notes:
        ctx.progress.note(note)
    run = _Run(recipe, out, ctx)
    with workers(jobs) as executor:
        while len(run.outcomes) < len(recipe.stages):
            for stage in run.ready()[: jobs - len(run.running)]:
                run.start(stage, executor, jobs)
            if run.running:
                done, _ = wait(run.running, return_when=FIRST_COMPLETED)
                for future in done:
                    run.finish(future)
    outcome = run.outcome(tuple(notes))
    summary = {
        "schema": 1,
        "title": recipe.title,
        "seed": recipe.seed,
        "solera": __version__,
        "verdict": outcome.verdict,
        "notes": notes,
        "stages": [asdict(o) | {"path": str(o.path.relative_to(out))} for o in outcome.stages],
    }
    with disk_errors(out):
        (out / "run.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return outcome


@dataclass(frozen=True)
class _Started:
    stage: Stage
    key: str
    at: float


class _Run:
    """The state of one run: what is finished, what is under way, what may start."""

    def __init__(self, recipe: Recipe, out: Path, ctx: Context) -> None:
        self._recipe, self._out, self._ctx = recipe, out, ctx
        self._made: dict[str, Path] = {}
        self._verdicts: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, StageOutcome] = {}
        self.running: dict[Future[Path], _Started] = {}

    def ready(self) -> list[Stage]:
        """Stages that have not started and whose inputs are finished, in the recipe's order."""
        under_way = {started.stage.name for started in self.running.values()}
        return [
            stage
            for stage in self._recipe.stages
            if stage.name not in self.outcomes
            and stage.name not in under_way
            and all(name in self.outcomes for name in self._recipe.inputs(stage))
        ]

    def start(self, stage: Stage, executor: Executor, jobs: int) -> None:
        """Skip a stage, hold it back, or submit it."""
        path = self._path(stage)
        refused = [v for v in stage.references.verdicts if self._verdicts[v]["verdict"] != "PASS"]
        if refused:
            note = f"held back: {refused[0]} says {self._verdicts[refused[0]]['verdict']}"
            self._say(stage, note)
            self._settle(stage, "held back", 0.0, "", note)
            return
        with _named(stage):
            here = _stage_context(self._recipe, self._ctx, self._made)
            key = _key(stage, here)
            if (record := _current(stage, self._out, key)) is not None:
                self._say(stage, "cached")
                self._settle(stage, "cached", record["seconds"], record["digest"])
                return
            self._say(stage, "running")
            _key_file(self._out, stage.name).unlink(missing_ok=True)
            here = replace(here, overwrite=True)  # an outdated output of this very stage may be replaced, at the end
            started = _Started(stage, key, time.monotonic())
            if isinstance(stage.config, PublishConfig):
                self.running[self._released(stage.config, path, here)] = started
            else:
                future = start_stage(executor, stage.name, stage.kind, stage.config, path, here, jobs=jobs)
                self.running[future] = started

    def finish(self, future: "Future[Path]") -> None:
        """Record what a stage made. Raises its error, with its name."""
        started = self.running.pop(future)
        with _named(started.stage):
            try:
                path = future.result()
            except BrokenExecutor as e:
                raise ResourceError(
                    "its process was killed, most likely because memory ran out; run again with fewer --jobs"
                ) from e
        seconds = round(time.monotonic() - started.at, 1)
        digest = directory_digest(path)
        record = {"key": started.key, "digest": digest, "seconds": seconds, "files": _listing(path)}
        with disk_errors(self._out):
            _key_file(self._out, started.stage.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._say(started.stage, f"done in {seconds:.0f} s")
        self._settle(started.stage, "made", seconds, digest)

    def outcome(self, notes: tuple[str, ...] = ()) -> RunOutcome:
        """What is finished so far, in the recipe's order."""
        stages = tuple(self.outcomes[s.name] for s in self._recipe.stages if s.name in self.outcomes)
        return RunOutcome(self._out, stages, dict(self._verdicts), notes)

    def _released(self, config: PublishConfig, path: Path, ctx: Context) -> "Future[Path]":
        """Publishing runs here, not in a worker: it reads the run itself and takes no time."""
        from solera.release import release

        future: Future[Path] = Future()
        future.set_result(release(config, path, ctx, run=self.outcome(), recipe=self._recipe))
        return future

    def _settle(self, stage: Stage, status: str, seconds: float, digest: str, note: str = "") -> None:
        path, inputs = self._path(stage), self._recipe.inputs(stage)
        self.outcomes[stage.name] = StageOutcome(stage.name, stage.kind, inputs, status, seconds, digest, path, note)
        if status != "held back":
            self._made[stage.name] = path
        verdict = path / "verdict.json"
        if stage.kind == "eval" and verdict.exists():
            self._verdicts[stage.name] = json.loads(verdict.read_text(encoding="utf-8"))

    def _path(self, stage: Stage) -> Path:
        return self._out / "stages" / stage.name

    def _say(self, stage: Stage, what: str) -> None:
        number = self._recipe.stages.index(stage) + 1
        self._ctx.progress.note(f"[{number}/{len(self._recipe.stages)}] {stage.name} ({stage.kind}): {what}")


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Put the stage's name in front of its error."""
    try:
        yield
    except SoleraError as e:
        raise type(e)(f"stage {stage.name!r} ({stage.kind}): {e}") from e


def _stage_context(recipe: Recipe, ctx: Context, made: Mapping[str, Path]) -> Context:
    return replace(ctx, seed=recipe.seed, base_dir=recipe.base_dir, models=dict(made))


def _key_file(out: Path, name: str) -> Path:
    return out / "keys" / f"{name}.json"


def _key(stage: Stage, ctx: Context) -> str:
    """Hash of everything that goes into a stage: settings, seed, contents of its models and texts, our version."""
    from solera_core.checkpoint import open_checkpoint
    from solera_core.hub import resolve, split_adapter
    from solera_core.lora import is_adapter, open_stored
    from solera_core.provenance import tokenizer_record
    from solera_core.raw import open_tokenizer

    models: dict[str, str] = {}
    for reference in stage.references.models:
        route = find_route(reference, ctx)
        if (made := route or ctx.models.get(reference)) is not None:
            models[reference] = directory_digest(made)
        elif split_adapter(reference, ctx) is None and is_adapter(resolve(reference, ctx, weights="later").path):
            models[reference] = open_stored(reference, ctx).digest()
        else:
            models[reference] = open_checkpoint(reference, ctx).digest()
    for reference in stage.references.tokenizers:
        models[reference] = tokenizer_record(open_tokenizer(reference, ctx)).digest
    ingredients = {
        "kind": stage.kind,
        "config": stage.config.model_dump(mode="json", by_alias=True),
        "seed": ctx.seed,
        "models": models,
        "verdicts": {v: directory_digest(ctx.models[v]) for v in stage.references.verdicts},
        "data": {source.path: _data_digest(source, ctx.base_dir) for source in stage.references.data},
        "suites": _suite_digest(stage, ctx.base_dir),
        "compat": ctx.compat,
        "solera": __version__,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _suite_digest(stage: Stage, base_dir: Path) -> str | None:
    """Of the tasks and every item of an eval stage."""
    from solera_eval.suite import load_suites

    return load_suites(stage.config.suites, base_dir=base_dir).digest if isinstance(stage.config, EvalConfig) else None


def _data_digest(source: DataSource, base_dir: Path) -> str:
    from solera_core.provenance import data_record

    return data_record(source.path, source, base_dir).digest


def directory_digest(directory: Path) -> str:
    """What a stage's output is: the digest in its solera.json, or the hash of all its files (evaluation results)."""
    provenance = directory / "solera.json"
    if provenance.exists():
        return str(json.loads(provenance.read_text(encoding="utf-8"))["digest"])
    total = hashlib.sha256()
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        total.update(str(file.relative_to(directory)).encode() + b"\0")
        total.update(bytes.fromhex(file_sha256(file)))
    return f"sha256:{total.hexdigest()}"


def _listing(directory: Path) -> dict[str, list[int]]:
    """Size and modification time of every file: cheap to compare, enough to notice a hand at work."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def _current(stage: Stage, out: Path, key: str) -> dict[str, Any] | None:
    """The record of a stage that need not run: made from the same, and untouched since."""
    file, path = _key_file(out, stage.name), out / "stages" / stage.name
    if not file.exists() or not path.is_dir():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None  # a kill while it was written: the stage is made again
    return record if record.get("key") == key and record.get("files") == _listing(path) else None


def _check_leaks(recipe: Recipe) -> list[str]:
    """Refuse a recipe that trains on an evaluation item as a whole; say where parts of items occur in training text.

    Returns:
        One sentence per eval stage whose items share 13 words in a row (or all of a short item) with training text.
    """
    from solera_core.data import read_documents
    from solera_eval.leaks import find_leaks
    from solera_eval.suite import load_suites

    evals = [(stage.name, stage.config) for stage in recipe.stages if isinstance(stage.config, EvalConfig)]
    sources = [s for stage in recipe.stages if stage.kind in _TRAINING for s in stage.references.data]
    if not evals or not sources:
        return []
    training = read_documents(list(dict.fromkeys(sources)), base_dir=recipe.base_dir)
    notes: list[str] = []
    for name, config in evals:
        suite = load_suites(config.suites, base_dir=recipe.base_dir)
        leaks = find_leaks(training, suite)
        whole = [leak for leak in leaks if leak.kind == "document"]
        if whole:
            raise ConfigError(
                f"{name}: {len(whole)} items of task {whole[0].task!r} are trained on as they stand (first: item "
                f"{whole[0].item}); a score on them would mean nothing. Take them out of one side"
            )
        if leaks:
            most = max(leaks, key=lambda leak: leak.share)
            n_items = sum(len(task.items) for task in suite.tasks)
            notes.append(
                f"{name}: {len(leaks)} of {n_items} items share 13 words in a row with training text "
                f"(at most {most.share:.0%} of an item, in {most.task})."
            )
    return notes
