"""The evaluation stage: models and suites in, a directory of evidence (and a verdict) out."""

import json
import sys
from pathlib import Path
from typing import Any

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import path_bytes
from solera_core.errors import CheckpointError, DataError
from solera_core.fold import loadable
from solera_core.plan import Plan
from solera_core.route import Route, find_route, open_route
from solera_core.staging import check_apart, check_target, staged
from solera_core.threads import torch_threads
from solera_eval.config import EvalConfig
from solera_eval.gate import check_policy, compare
from solera_eval.records import METRIC_OF, ItemRecord, Results, TaskResult, summarise, write_results
from solera_eval.routed import score_routed
from solera_eval.suite import LoadedTask, Suite, load_suites
from solera_eval.task import score_task, settings_of

__all__ = ["evaluate", "plan_evaluate"]

_ITEM_BYTES = 200  # of one line of items.jsonl, roughly
_DOCUMENT_BYTES = 4096  # of the other files
_ACTIVATIONS_BYTES = 1 << 26
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_evaluate(config: EvalConfig, ctx: Context) -> Plan:
    """What `evaluate` will read, score and write. Reads the data and the models' headers, no weights.

    Raises:
        InputError: whatever `evaluate` would refuse before it loads a model.
    """
    suite, models = _prepare(config, ctx)
    items = sum(len(task.items) for task in suite.tasks)
    checkpoints = [checkpoint for model in models.values() for checkpoint in _checkpoints(model)]
    elements = max(sum(info.size for info in checkpoint.tensors.values()) for checkpoint in checkpoints)
    folders = [""] if config.model is not None else [f"{name}/" for name in models]
    folded = max((_bytes(checkpoint) for checkpoint in checkpoints if _is_adapted(checkpoint)), default=0)
    sizes_of = {"results.json": _DOCUMENT_BYTES, "items.jsonl": items * _ITEM_BYTES}
    writes = [{"what": f"{folder}{file}", "bytes": size} for folder in folders for file, size in sizes_of.items()]
    writes += [{"what": name, "bytes": _DOCUMENT_BYTES} for name in _tops(config)]
    return Plan(
        stage="eval",
        reads=[
            *({"what": c.ref, "path": str(c.path), "bytes": _bytes(c), "kind": "model"} for c in checkpoints),
            *(_data_row(task) for task in suite.tasks),
        ],
        writes=writes,
        memory_bytes=elements * _DTYPE_BYTES[config.dtype] + _ACTIVATIONS_BYTES,
        disk_bytes=len(folders) * sum(sizes_of.values()) + len(_tops(config)) * _DOCUMENT_BYTES + folded,
        parameters=config.model_dump(mode="json"),
        rows=[
            {
                "task": task.name,
                "kind": task.config.kind,
                "domain": task.config.domain or "",
                "items": len(task.items),
                "metric": METRIC_OF[task.config.kind],
            }
            for task in suite.tasks
        ],
        warnings=_warnings(config, suite),
    )


def evaluate(config: EvalConfig, out: Path, ctx: Context) -> Path:
    """Score every model on every task and write the evidence; with a gate, the verdict too.

    A single `model` gives out/results.json and out/items.jsonl; `models` give out/<name>/ of the same. out/run.json
    says what was run, out/verdict.json is the gate's answer. Models are loaded one after the other.

    Returns:
        `out`.

    Raises:
        InputError: a model, a tokenizer, data, a policy or the target are not what they should be. Everything that can
            be checked without weights is checked before the first model is loaded.
    """
    check_target(out, overwrite=ctx.overwrite)
    suite, models = _prepare(config, ctx)
    check_apart(out, [directory for model in models.values() for directory in model.directories])
    tokenizers = {name: _tokenizer(model.path, ctx) for name, model in models.items() if not isinstance(model, Route)}
    for model in models.values():
        if isinstance(model, Route):
            model.require_unchanged()
    with staged(out, overwrite=ctx.overwrite) as staging, torch_threads(ctx.threads):
        results: dict[str, Results] = {}
        for name, model in models.items():
            if isinstance(model, Route):
                results[name] = score_routed(name, config.named_models()[name], model, suite, config, ctx)
            else:
                with loadable(model, staging) as path:
                    results[name] = _evaluate_one(name, model, path, tokenizers[name], suite, config, ctx)
            directory = staging if config.model is not None else staging / name
            directory.mkdir(exist_ok=True)
            write_results(directory, results[name])
        outcome = None
        if config.gate is not None:
            baseline, candidate = (_named(config, role) for role in (config.gate.baseline, config.gate.candidate))
            verdict = compare(results[baseline], results[candidate], config.gate)
            outcome = verdict.verdict
            _write_json(staging / "verdict.json", verdict.to_json())
        _write_json(
            staging / "run.json",
            {
                "schema": 1,
                "kind": "eval",
                "models": {
                    name: {"directory": "." if config.model is not None else name, **result.model}
                    for name, result in results.items()
                },
                "suite": {"name": suite.name, "digest": suite.digest},
                "config": config.model_dump(mode="json"),
                "verdict": outcome,
            },
        )
    return out


def _prepare(config: EvalConfig, ctx: Context) -> tuple[Suite, dict[str, Checkpoint | Route]]:
    suite = load_suites(config.suites, base_dir=ctx.base_dir)
    if config.gate is not None:
        check_policy(config.gate, {task.name: METRIC_OF[task.config.kind] for task in suite.tasks})
    return suite, {name: _open(ref, ctx) for name, ref in config.named_models().items()}


def _open(ref: str, ctx: Context) -> Checkpoint | Route:
    route = find_route(ref, ctx)
    return open_checkpoint(ref, ctx) if route is None else open_route(route, ctx)


def _checkpoints(model: Checkpoint | Route) -> list[Checkpoint]:
    if not isinstance(model, Route):
        return [model]
    return [*model.specialists.values(), *([] if model.base is None else [model.base])]


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(info.nbytes for info in checkpoint.tensors.values())


def _tokenizer(path: Path, ctx: Context) -> Any:
    from solera_core.causal_lm import load_tokenizer

    tokenizer: Any = load_tokenizer(path, trust_remote_code=ctx.trust_remote_code)
    tokenizer.model_max_length = sys.maxsize  # long texts are cut into windows here: its warning would mislead
    return tokenizer


def _data_row(task: LoadedTask) -> dict[str, Any]:
    given = task.config.data
    where = str(task.path or given)
    return {"what": f"task {task.name}", "path": where, "bytes": task.path and path_bytes(task.path), "kind": "data"}


def _tops(config: EvalConfig) -> list[str]:
    """Files at the top of the output, beside the results."""
    return ["run.json"] if config.gate is None else ["run.json", "verdict.json"]


def _named(config: EvalConfig, role: str | None) -> str:
    name = None if role is None else config.resolve(role)
    assert name is not None  # EvalConfig has checked it
    return name


def _warnings(config: EvalConfig, suite: Suite) -> list[str]:
    if config.gate is None:
        return []
    return [
        f"task {task.name!r} has {len(task.items)} items, fewer than the gate's minimum_items: "
        f"{config.gate.minimum_items}; its verdict will be INCONCLUSIVE"
        for task in suite.tasks
        if len(task.items) < config.gate.minimum_items
    ]


def _is_adapted(model: Checkpoint) -> bool:
    return any(model.is_derived(name) for name in model.tensors)


# one model -----------------------------------------------------------------------------------------------------------


def _evaluate_one(
    name: str, checkpoint: Checkpoint, path: Path, tokenizer: Any, suite: Suite, config: EvalConfig, ctx: Context
) -> Results:
    from solera_core.causal_lm import load_model
    from solera_core.inspect import parameter_count
    from solera_core.prefix import describe_prefix

    count = parameter_count(checkpoint)
    model = load_model(path, dtype=config.dtype, trust_remote_code=ctx.trust_remote_code, allow_pickle=ctx.allow_pickle)
    tasks: list[TaskResult] = []
    items: list[ItemRecord] = []
    for task in suite.tasks:
        try:
            with ctx.progress.task(f"{name}: {task.name}", total=len(task.items), unit="items") as progress:
                records, extra = score_task(model, tokenizer, task, config.batch_tokens, progress.advance)
        except (DataError, CheckpointError) as e:
            raise type(e)(f"model {name!r}, task {task.name!r}: {e}") from e
        tasks.append(summarise(task.name, task.config.kind, task.config.domain, records, extra))
        items += records
    return Results(
        model={
            "name": name,
            "ref": checkpoint.ref,
            "revision": checkpoint.revision,
            "digest": checkpoint.digest(),
            "parameters": {"total": count.total, "active": count.active, "bytes": count.bytes},
        },
        suite={"name": suite.name, "digest": suite.digest},
        tasks=tasks,
        items=items,
        settings=settings_of(config, describe_prefix(tokenizer)),
        where=name,
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
