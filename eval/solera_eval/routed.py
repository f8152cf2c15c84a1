"""A route measured like a model: every item is answered by the specialist that the router chooses for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from solera_core.architecture import text_config
from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, DataError
from solera_core.inspect import parameter_count
from solera_core.provenance import read_provenance
from solera_core.route import Loader, Route, request_of
from solera_eval.config import EvalConfig, TextTask
from solera_eval.records import ItemRecord, Results, TaskResult, summarise
from solera_eval.suite import Item, LoadedTask, Suite, TextItem
from solera_eval.task import score_task, settings_of

__all__ = ["request_of_item", "score_routed"]


def request_of_item(item: Item) -> str:
    """What a router may see of an item: never the answer. Of a question without a prompt, all choices alike."""
    if isinstance(item, TextItem):
        return request_of(item.document)
    return item.prompt or "\n".join(getattr(item, "choices", ()))


def score_routed(name: str, ref: str, route: Route, suite: Suite, config: EvalConfig, ctx: Context) -> Results:
    """Score all tasks; the models are loaded one after the other, each once.

    Text is scored in windows that every specialist's context holds, so that they see equally much of it.

    Raises:
        DataError: an item that its specialist cannot be asked.
        CheckpointError: a model gives NaN.
    """
    from solera_core.prefix import describe_prefix

    load = Loader(ctx, dtype=config.dtype, keep=1)
    narrowed = [_narrowed(task, list(route.specialists.values())) for task in suite.tasks]
    requests = [request_of_item(item) for task in narrowed for item in task.items]
    with ctx.progress.task(f"{name}: routing", total=len(requests), unit="items") as progress:
        chosen = iter(route.assign(requests, load))
        progress.advance(len(requests))
    names = {task.name: [next(chosen) for _ in task.items] for task in narrowed}
    records: dict[str, dict[int, ItemRecord]] = {task.name: {} for task in narrowed}
    extras: dict[str, list[tuple[int, dict[str, Any]]]] = {task.name: [] for task in narrowed}
    tokenizers: dict[str, Any] = {}
    for specialist, checkpoint in route.specialists.items():
        for task in narrowed:
            mine = [i for i, n in enumerate(names[task.name]) if n == specialist]
            if not mine:
                continue
            model, tokenizer = load(checkpoint)
            tokenizers[specialist] = describe_prefix(tokenizer)
            part = replace(task, items=tuple(task.items[i] for i in mine))
            try:
                with ctx.progress.task(f"{name}: {task.name} by {specialist}", len(mine), "items") as progress:
                    found, extra = score_task(model, tokenizer, part, config.batch_tokens, progress.advance)
            except (DataError, CheckpointError) as e:
                raise type(e)(f"model {name!r} (specialist {specialist!r}), task {task.name!r}: {e}") from e
            marked = [replace(r, detail={**r.detail, "specialist": specialist}) for r in found]
            records[task.name] |= dict(zip(mine, marked, strict=True))
            extras[task.name].append((len(mine), extra))
    tasks: list[TaskResult] = []
    items: list[ItemRecord] = []
    for task in narrowed:
        ordered = [records[task.name][i] for i in range(len(task.items))]
        tasks.append(
            summarise(task.name, task.config.kind, task.config.domain, ordered, _joined(task, extras[task.name]))
        )
        items += ordered
    return Results(
        model={
            "name": name,
            "ref": ref,
            "revision": None,
            "digest": read_provenance(route.directory)["digest"],
            "parameters": _parameters(route),
        },
        suite={"name": suite.name, "digest": suite.digest},
        tasks=tasks,
        items=items,
        settings=settings_of(config, tokenizers),
        where=name,
    )


def _narrowed(task: LoadedTask, specialists: Sequence[Checkpoint]) -> LoadedTask:
    if not isinstance(task.config, TextTask):
        return task
    keys = ("max_position_embeddings", "n_positions")
    contexts = [text_config(model.config).get(key) for model in specialists for key in keys]
    window = min([task.config.window_tokens, *(n for n in contexts if isinstance(n, int))])
    return replace(task, config=task.config.model_copy(update={"window_tokens": window}))


def _joined(task: LoadedTask, extras: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """What is known of a task whose parts were scored apart; the chance of a text is the largest vocabulary's."""
    together = dict(extras[0][1])
    if isinstance(task.config, TextTask):
        together["chance"] = max(extra["chance"] for _, extra in extras)
    else:
        together["chance"] = sum(n * extra["chance"] for n, extra in extras) / sum(n for n, _ in extras)
    return together


def _parameters(route: Route) -> dict[str, int]:
    """All that is stored; active are the base's and the largest specialist's, of a cascade all that may be asked."""
    counts = {name: parameter_count(model) for name, model in route.specialists.items()}
    base = None if route.base is None else parameter_count(route.base)
    everything = [*counts.values(), *([] if base is None else [base])]
    asked = (
        sum(c.active for c in counts.values()) if base is None else base.active + max(c.active for c in counts.values())
    )
    return {
        "total": sum(c.total for c in everything),
        "active": asked,
        "bytes": sum(c.bytes for c in everything),
    }
