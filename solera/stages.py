"""The kinds of stage a recipe can name, and what each needs from the others.

Importing this file imports the configuration models only; torch and transformers come with `run`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from solera_core.context import Context
from solera_core.data import DataSource
from solera_core.errors import ConfigError
from solera_core.plan import Plan
from solera_core.strict import Strict, did_you_mean, load_yaml, load_yaml_documents, parse
from solera_merge.moe.mergekit import is_mergekit

__all__ = [
    "KINDS",
    "References",
    "Stage",
    "all_problems",
    "model_references",
    "parse_settings",
    "parse_stage",
    "plan_stage",
    "read_stage",
    "run_stage",
    "stage_config",
]

KINDS = (
    "init",
    "tune",
    "merge",
    "extract-lora",
    "moe",
    "moe-prune",
    "moe-merge-experts",
    "moe-extract-lora",
    "route",
    "distill",
    "eval",
    "publish",
)


@dataclass(frozen=True)
class References:
    """What a stage reads: models by reference as written, text by source, other stages' verdicts by stage name.

    `tokenizers`: models, or directories that are none, of which only the tokenizer is read.
    """

    models: tuple[str, ...] = ()
    data: tuple[DataSource, ...] = ()
    verdicts: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()

    @property
    def directories(self) -> tuple[str, ...]:
        """All that may be the name of a stage that must be there first."""
        return (*self.models, *self.tokenizers, *self.verdicts)


@dataclass(frozen=True)
class Stage:
    """One parsed node of a recipe."""

    name: str
    kind: str
    config: Strict
    references: References


def stage_config(kind: str) -> type[Strict]:
    """The configuration model of a kind.

    Raises:
        ConfigError: no such kind.
    """
    match kind:
        case "init":
            from solera_distill.config import InitConfig

            return InitConfig
        case "tune":
            from solera_distill.config import TuneConfig

            return TuneConfig
        case "distill":
            from solera_distill.config import DistillConfig

            return DistillConfig
        case "merge":
            from solera_merge.config import MergeConfig

            return MergeConfig
        case "extract-lora":
            from solera_merge.adapters.extract import ExtractConfig

            return ExtractConfig
        case "moe":
            from solera_merge.moe.config import MoeConfig

            return MoeConfig
        case "moe-prune":
            from solera_merge.moe.size.config import PruneConfig

            return PruneConfig
        case "moe-merge-experts":
            from solera_merge.moe.size.config import MergeExpertsConfig

            return MergeExpertsConfig
        case "moe-extract-lora":
            from solera_merge.moe.size.config import ExtractExpertsConfig

            return ExtractExpertsConfig
        case "route":
            from solera_merge.route.config import RouteConfig

            return RouteConfig
        case "eval":
            from solera_eval.config import EvalConfig

            return EvalConfig
        case "publish":
            from solera.publish import PublishConfig

            return PublishConfig
        case _:
            raise ConfigError(f"unknown kind of stage {kind!r}{did_you_mean(kind, KINDS)}")


def parse_stage(name: str, node: Any, *, where: str) -> Stage:
    """Parse `{kind: {...}}`.

    Raises:
        ConfigError: the node has not exactly one known kind, or its settings are wrong.
    """
    if not isinstance(node, Mapping) or len(node) != 1:
        raise ConfigError(
            f"{where}: a stage is one kind with its settings, e.g. `{{tune: {{...}}}}`; kinds: {', '.join(KINDS)}"
        )
    kind, settings = next(iter(node.items()))
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown kind of stage {kind!r}{did_you_mean(str(kind), KINDS)}")
    config = parse(stage_config(kind), settings, where=f"{where}.{kind}")
    return Stage(name, kind, config, _references(kind, config))


def read_stage(kind: str, file: Path) -> tuple[Strict, Path]:
    """The settings of one stage from a file of its own, and the directory its paths are relative to.

    The file holds the settings, or a recipe's node (`{kind: {...}}`) as it stands under `stages:`. Paths are relative
    to the file; mergekit's own configs (of a merge or a MoE) follow it: relative to where one stands.

    Raises:
        ConfigError: naming file and key.
    """
    documents = load_yaml_documents(file) if kind == "merge" else [load_yaml(file)]
    if len(documents) > 1:
        settings: Any = {"documents": documents}
    else:
        settings = documents[0] if documents else None
        if isinstance(settings, Mapping) and set(settings) == {kind}:
            settings = settings[kind]
        if kind == "merge" and isinstance(settings, Mapping):  # the only one needs no name, but may have one
            settings = {key: value for key, value in settings.items() if key != "name"}
    here = kind == "merge" or (kind == "moe" and is_mergekit(settings))
    return parse_settings(kind, settings, where=str(file)), Path() if here else file.parent


def parse_settings(kind: str, settings: Any, *, where: str) -> Strict:
    """The settings of one stage; of a merge also several `documents`.

    Raises:
        ConfigError: naming the key.
    """
    if kind == "merge" and isinstance(settings, Mapping) and "documents" in settings:
        from solera.documents import DocumentsConfig

        return parse(DocumentsConfig, settings, where=where)
    return parse(stage_config(kind), settings, where=where)


def all_problems(kind: str, file: Path, found: ConfigError, ctx: Context) -> ConfigError:
    """What is wrong with the settings of a merge, and with its models as far as that can be said all the same.

    Args:
        kind: of the stage; others than a merge are left as they are.
        file: of the settings, which `read_stage` refused.
        found: its error.
        ctx: where the models are looked for.
    """
    if kind != "merge":
        return found
    try:
        settings = load_yaml(file)
    except ConfigError:
        return found
    from solera_merge.examine import examine

    settings = settings[kind] if isinstance(settings, Mapping) and set(settings) == {kind} else settings
    return ConfigError("\n".join(dict.fromkeys([*str(found).splitlines(), *examine(settings, ctx)])))


def plan_stage(kind: str, config: Strict, ctx: Context) -> Plan:
    """What the stage will read, write and need, from headers and file sizes alone."""
    return _functions(kind, config)[0](config, ctx)


def run_stage(kind: str, config: Strict, out: Path, ctx: Context) -> Path:
    """Run one stage; `out` is whole and checked when this returns, and does not exist when it raises."""
    return _functions(kind, config)[1](config, out, ctx)


_Plan = Callable[[Any, Context], Plan]
_Run = Callable[[Any, Path, Context], Path]


def _functions(kind: str, config: Strict) -> tuple[_Plan, _Run]:
    match kind:
        case "init":
            from solera_distill.run import init, plan_init

            return plan_init, init
        case "tune":
            from solera_distill.run import plan_tune, tune

            return plan_tune, tune
        case "distill":
            from solera_distill.run import distill, plan_distill

            return plan_distill, distill
        case "merge" if "documents" in type(config).model_fields:
            from solera.documents import merge_documents, plan_documents

            return plan_documents, merge_documents
        case "merge":
            from solera_merge.run import merge, plan_merge

            return plan_merge, merge
        case "extract-lora":
            from solera_merge.adapters.extract import extract_lora, plan_extract

            return plan_extract, lambda config, out, ctx: extract_lora(config, out, ctx).out
        case "moe":
            from solera.healing import build_trained, is_trained, plan_trained
            from solera_merge.moe.build import build_moe, plan_moe
            from solera_merge.moe.config import MoeConfig

            assert isinstance(config, MoeConfig)
            return (plan_trained, build_trained) if is_trained(config) else (plan_moe, build_moe)
        case "moe-prune" | "moe-merge-experts":
            from solera_merge.moe.size.shrink import build_shrunk, plan_shrunk

            return plan_shrunk, build_shrunk
        case "moe-extract-lora":
            from solera_merge.moe.size.low_rank import extract_experts, plan_extract_experts

            return plan_extract_experts, extract_experts
        case "route":
            from solera_merge.route.build import build_route, plan_route

            return plan_route, build_route
        case "eval":
            from solera_eval.run import evaluate, plan_evaluate

            return plan_evaluate, evaluate
        case _:
            raise ConfigError(f"a {kind!r} stage only runs inside a recipe")


def _references(kind: str, config: Strict) -> References:
    match kind:
        case "eval":
            from solera_eval.config import EvalConfig

            assert isinstance(config, EvalConfig)
            return References(tuple(config.named_models().values()))
        case "publish":
            from solera.publish import PublishConfig

            assert isinstance(config, PublishConfig)
            return References((config.model,), (), (config.when,) if config.when else ())
        case _:
            models, sources = dict.fromkeys(model_references(config)), dict.fromkeys(_sources(config))
            return References(tuple(models), tuple(sources), tokenizers=_tokenizers(config, models))


_MODEL_FIELDS = {"model", "base_model", "from_", "source_model", "extend"}


def model_references(value: Any, field: str = "") -> Iterable[str]:
    """Every string in a field that holds a model reference, anywhere below."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from model_references(getattr(value, name), name)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from model_references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from model_references(item, field)
    elif isinstance(value, str) and field in _MODEL_FIELDS:
        yield value


def _tokenizers(config: Strict, models: Collection[str]) -> tuple[str, ...]:
    """The model that gives a merge's tokenizer, where it is none of those that are merged."""
    from solera_merge.config import MergeConfig

    wanted = config.wanted_tokenizer if isinstance(config, MergeConfig) else None
    return () if wanted is None or wanted.source in ("base", "union", *models) else (wanted.source,)


def _sources(value: Any) -> Iterable[DataSource]:
    if isinstance(value, DataSource):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _sources(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _sources(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _sources(item)
