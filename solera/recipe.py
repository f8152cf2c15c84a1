"""A recipe: named stages, each input another stage or a checkpoint, in one YAML file.

    solera: 1
    seed: 0
    vars: {data: ../data}                   # ${data} below; `--set data=...` overrides
    stages:
      math:    {tune: {model: base, data: "${data}/math.jsonl", tokens: 2M}}
      blend:   {merge: {merge_method: ties, base_model: base, models: [...]}}
      student: {distill: {teachers: [{model: blend}], student: {from: blend, layer_drop: {ratio: 0.5}}, ...}}
      verdict: {eval: {models: [base, math, blend, student], suites: [...], gate: {...}}}
    report: {base: base, specialists: {math: math}, moe: moe, control: control}

Paths are relative to the recipe file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from solera.stages import Stage, parse_stage
from solera_core.errors import ConfigError
from solera_core.strict import Strict, did_you_mean, load_yaml, parse

__all__ = ["Recipe", "RecipeFile", "ReportConfig", "load_recipe", "parse_recipe"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class ReportConfig(Strict):
    """What the report compares with what.

    Attributes:
        base: the model that all specialists were tuned from.
        specialists: domain -> the model that is the specialist of it.
        moe: the mixture whose worth is asked.
        control: a dense model of the base's size taught by the same specialists for the same tokens.
    """

    base: str | None = None
    specialists: dict[str, str] = Field(default_factory=dict[str, str])
    moe: str | None = None
    control: str | None = None


class RecipeFile(Strict):
    """The YAML as written; the stages are parsed by kind afterwards."""

    solera: Literal[1]
    title: str = ""
    seed: int = 0
    vars: dict[str, str] = Field(default_factory=dict[str, str])
    stages: dict[str, Any] = Field(min_length=1)
    report: ReportConfig = ReportConfig()


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `stages` is in an order in which every stage comes after what it reads."""

    title: str
    seed: int
    stages: tuple[Stage, ...]
    report: ReportConfig
    base_dir: Path
    source: Mapping[str, Any]

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(s for s in self.stages if s.name == name)

    def inputs(self, stage: Stage) -> tuple[str, ...]:
        """Names of the stages that `stage` reads."""
        names = {s.name for s in self.stages}
        wanted = [part for ref in stage.references.directories for part in _parts(ref)]
        return tuple(dict.fromkeys(n for n in wanted if n in names))


def load_recipe(path: Path, *, seed: int | None = None, variables: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ConfigError: naming file, key and, where one is near, the key that was meant.
    """
    return parse_recipe(load_yaml(path), base_dir=path.parent, where=path.name, seed=seed, variables=variables)


def parse_recipe(
    data: Any,
    *,
    base_dir: Path,
    where: str,
    seed: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Recipe:
    """Check a recipe given as a mapping; see `load_recipe`."""
    written = parse(RecipeFile, data, where=where)
    if unknown := [v for v in (variables or {}) if v not in written.vars]:
        raise ConfigError(f"{where}: --set {unknown[0]}: no such variable{did_you_mean(unknown[0], written.vars)}")
    values = {**written.vars, **(variables or {})}
    stages: dict[str, Stage] = {}
    for name, node in written.stages.items():
        if not _NAME.match(name):
            raise ConfigError(
                f"{where}: stages.{name}: a stage's name is letters, digits, ., - and _, for it names a directory"
            )
        filled = _substitute(node, values, f"{where}: stages.{name}")
        stages[name] = parse_stage(name, filled, where=f"{where}: stages.{name}")
    report = parse(
        ReportConfig, _substitute(data.get("report", {}), values, f"{where}: report"), where=f"{where}: report"
    )
    for key, model in [
        ("base", report.base),
        ("moe", report.moe),
        ("control", report.control),
        *report.specialists.items(),
    ]:
        if model is not None and model not in stages and not _evaluated(model, stages.values()):
            raise ConfigError(
                f"{where}: report.{key}: {model!r} is neither a stage nor evaluated{did_you_mean(model, stages)}"
            )
    _check_verdicts(stages, where)
    chosen_seed = written.seed if seed is None else seed
    resolved = {**dict(data), "seed": chosen_seed, "vars": values}
    return Recipe(
        written.title,
        chosen_seed,
        _ordered(stages, where),
        report,
        base_dir,
        resolved,
    )


def _evaluated(model: str, stages: Iterable[Stage]) -> bool:
    """Whether some eval stage measures a model under that name."""
    from solera_eval.config import EvalConfig

    return any(isinstance(s.config, EvalConfig) and model in s.config.named_models() for s in stages)


def _check_verdicts(stages: Mapping[str, Stage], where: str) -> None:
    for stage in stages.values():
        for verdict in stage.references.verdicts:
            if verdict not in stages or stages[verdict].kind != "eval":
                known = [s.name for s in stages.values() if s.kind == "eval"]
                raise ConfigError(
                    f"{where}: stages.{stage.name}: when: {verdict!r} is no eval stage{did_you_mean(verdict, known)}"
                )
            if getattr(stages[verdict].config, "gate", None) is None:
                raise ConfigError(
                    f"{where}: stages.{stage.name}: when: {verdict!r} has no gate, so it gives no verdict"
                )


def _parts(reference: str) -> list[str]:
    """`model+lora` names two things."""
    return reference.split("+")


def _ordered(stages: Mapping[str, Stage], where: str) -> tuple[Stage, ...]:
    """Stages after their inputs, otherwise in the recipe's order. Raises ConfigError on a circle."""
    done: dict[str, Stage] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise ConfigError(f"{where}: stages read each other in a circle: {circle}")
        path.append(name)
        stage = stages[name]
        for reference in stage.references.directories:
            for part in _parts(reference):
                if part in stages:
                    visit(part)
        path.pop()
        done[name] = stage

    for name in stages:
        visit(name)
    return tuple(done.values())


def _substitute(value: Any, values: Mapping[str, str], where: str) -> Any:
    if isinstance(value, str):

        def fill(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in values:
                raise ConfigError(f"{where}: ${{{name}}}: no such variable{did_you_mean(name, values)}")
            return values[name]

        return _VARIABLE.sub(fill, value)
    if isinstance(value, Mapping):
        return {k: _substitute(v, values, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, values, where) for v in value]
    return value
