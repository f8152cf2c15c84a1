"""What an evaluation and a gate can be told: suites of tasks, and the policy a verdict is judged by."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from solera_core.data import DataSource
from solera_core.strict import Strict

__all__ = [
    "ChoiceTask",
    "EvalConfig",
    "GatePolicy",
    "GenerateTask",
    "Margins",
    "Metric",
    "SuiteConfig",
    "Task",
    "TaskPolicy",
    "TextTask",
]

Metric = Literal["perplexity", "accuracy", "exact_match"]

Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]


class _TaskBase(Strict):
    """What every task has.

    Attributes:
        name: unique in the suite.
        domain: what the task is about; joins it with the specialist of that domain.
        limit: score only the first so many items.
    """

    name: Name
    domain: str | None = None
    limit: int | None = Field(default=None, ge=1)


class TextTask(_TaskBase):
    """Log-likelihood of text, per document: NLL per token, perplexity, bits per byte.

    Attributes:
        data: documents; those with a prompt or a chat are scored on what an assistant would write.
        window_tokens: longer documents are scored in windows of this many tokens (never more than the model's own
            context). Every token is scored once.
    """

    kind: Literal["text"]
    data: DataSource
    window_tokens: int = Field(default=1024, ge=2)


class ChoiceTask(_TaskBase):
    """Multiple choice by log-likelihood: accuracy.

    Attributes:
        data: a jsonl file of rows {prompt?, choices: [text, ...], answer: index of the right one, id?}. Prompt and
            choice are joined as they are: a space between them is written in the data.
        normalise: what a choice's log-likelihood is divided by before the largest wins.
    """

    kind: Literal["choice"]
    data: str
    normalise: Literal["none", "bytes", "tokens"] = "none"


class GenerateTask(_TaskBase):
    r"""Greedy generation compared with the answer: exact match.

    Attributes:
        data: a jsonl file of rows {prompt, answer: text or list of accepted texts, id?}.
        max_new_tokens: generation ends here at the latest.
        stop: generation ends before the first of these strings.
        extract: a regular expression; its first match in the output (the first group, where it has one) is compared
            instead of the whole output. No match is a wrong answer.
    """

    kind: Literal["generate"]
    data: str
    max_new_tokens: int = Field(default=32, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=lambda: ["\n"])
    extract: str | None = None

    @field_validator("extract")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as e:
                raise ValueError(f"{value!r} is not a regular expression: {e}") from e
        return value


Task = Annotated[TextTask | ChoiceTask | GenerateTask, Field(discriminator="kind")]


class SuiteConfig(Strict):
    """A named list of tasks.

    Attributes:
        suite: its name.
        tasks: what is measured. Data paths are relative to the suite's own file (inline suites: to the recipe).
    """

    suite: Name
    tasks: list[Task] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> "SuiteConfig":
        _refuse_repeats("task", [task.name for task in self.tasks])
        return self


class Margins(Strict):
    """How much worse the candidate may be, by metric.

    Attributes:
        accuracy: largest accepted absolute drop of the share of right answers.
        exact_match: the same for generated answers; as `accuracy` where not given.
        perplexity: largest accepted ratio, candidate / baseline.
    """

    accuracy: float = Field(default=0.02, gt=0, lt=1)
    exact_match: float | None = Field(default=None, gt=0, lt=1)
    perplexity: float = Field(default=1.05, gt=1)

    def of(self, metric: Metric) -> float:
        """The margin of one metric."""
        if metric == "perplexity":
            return self.perplexity
        return self.accuracy if metric == "accuracy" or self.exact_match is None else self.exact_match


def _bare_margin(value: Any) -> Any:
    """A bare number m: an absolute drop of m, a perplexity ratio of 1 + m."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 < value < 1:
            raise ValueError(
                f"{value} is no margin; a bare number is the accepted loss (0.02 = two points of accuracy and a "
                "perplexity ratio of 1.02), between 0 and 1; or give a mapping {accuracy: 0.02, perplexity: 1.05}"
            )
        return {"accuracy": value, "perplexity": 1 + value}
    return value


class TaskPolicy(Strict):
    """Exceptions for one task.

    Attributes:
        margin: of this task, in the unit of its metric (an absolute drop; for perplexity a ratio > 1).
        tier: a `critical` task decides; an `advisory` one is judged and shown only.
    """

    margin: float | None = Field(default=None, gt=0)
    tier: Literal["critical", "advisory"] = "critical"


class GatePolicy(Strict):
    """The rule of a verdict, fixed before the numbers are seen.

    Attributes:
        candidate: the model that must not be worse (a name in `models`; not needed when two directories are given).
        baseline: the model it must not be worse than.
        margin: the accepted loss: a number, or one for each metric.
        confidence: one-sided, of every task's bound.
        tasks: exceptions by task name; tasks not named are critical.
        minimum_items: with fewer a task is INCONCLUSIVE whatever it shows (clustered errors of fewer than about 20
            documents are not to be trusted).
    """

    candidate: str | None = None
    baseline: str | None = None
    margin: Annotated[Margins, BeforeValidator(_bare_margin, json_schema_input_type=float | Margins)] = Field(
        default_factory=Margins
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    tasks: dict[str, TaskPolicy] = Field(default_factory=dict)
    minimum_items: int = Field(default=20, ge=2)


def _path_or_inline(value: Any) -> str:
    return "file" if isinstance(value, str) else "inline"


Suite = Annotated[
    Annotated[str, Tag("file")] | Annotated[SuiteConfig, Tag("inline")],
    Discriminator(_path_or_inline),
]


class EvalConfig(Strict):
    """One evaluation: models, suites, and perhaps a gate.

    Attributes:
        model: a single model; its results are written at the top of the output directory.
        models: several, as a list (named by the last part of the reference) or a mapping name -> reference; each
            gets a directory of its name.
        suites: suite files or inline suites; all their tasks together are scored.
        batch_tokens: most tokens, padding included, in one forward pass.
        dtype: of the weights and activations; log-probabilities are always float32.
        gate: compare two of the models; the verdict is written beside the results.
    """

    model: Name | None = None
    models: list[Name] | dict[Name, Name] = Field(default_factory=list)
    suites: list[Suite] = Field(min_length=1)
    batch_tokens: int = Field(default=4096, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gate: GatePolicy | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "EvalConfig":
        if (self.model is None) == (not self.models):
            raise ValueError("give either `model` or `models`")
        names = list(self.named_models())
        if isinstance(self.models, list):
            _refuse_repeats("model name", [model_name(ref) for ref in self.models])
        for name in names:
            if name in _RESERVED or not re.fullmatch(r"[\w+@=-][\w.+@=-]*", name):
                raise ValueError(
                    f"{name!r} cannot name a result directory; give `models` as a mapping name -> reference"
                )
        if self.gate is not None:
            if self.model is not None:
                raise ValueError("a gate compares two models: give `models`, or gate two result directories")
            for role, given in (("candidate", self.gate.candidate), ("baseline", self.gate.baseline)):
                if given is None:
                    raise ValueError(f"gate.{role}: name one of the models ({', '.join(names)})")
                if self.resolve(given) is None:
                    raise ValueError(f"gate.{role}: {given!r} is none of the models ({', '.join(names)})")
        return self

    def named_models(self) -> dict[str, str]:
        """Name -> reference, in order."""
        if self.model is not None:
            return {model_name(self.model): self.model}
        if isinstance(self.models, Mapping):
            return dict(self.models)
        return {model_name(ref): ref for ref in self.models}

    def resolve(self, name_or_ref: str) -> str | None:
        """The model name that a gate's candidate or baseline means; a reference is understood too."""
        named = self.named_models()
        return name_or_ref if name_or_ref in named else next((n for n, r in named.items() if r == name_or_ref), None)


_RESERVED = {"run.json", "verdict.json", "results.json", "items.jsonl"}


def model_name(ref: str) -> str:
    """The last part of a reference, without its revision: `org/name@rev` -> `name`."""
    return PurePosixPath(ref.rstrip("/")).name.split("@")[0] or ref


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} given twice: {', '.join(repeated)}")
