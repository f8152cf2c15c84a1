"""What a person needs to know before merging: what the models are, whether they belong together, what to try first.

Numbers are measured, on samples of the weights that are here; what is recommended goes back to published evidence,
which is named. Nothing is downloaded but small files and headers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.diff import Change, Diff, diff, whole
from solera_core.errors import InputError
from solera_core.inspect import describe
from solera_core.licence import concerns, read_front_matter, read_licence
from solera_core.strict import parse
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import MergePlan, make_plan
from solera_merge.vocabulary import conflicting_ids

__all__ = ["Advice", "Recipe", "advise", "method_notes", "model_rows"]

_SAMPLE: Final = 1 << 16  # elements of a tensor that are looked at
_RELATED, _UNRELATED = 0.5, 0.1  # cosine of the weights: fine-tunes of one base are near 1, independent models near 0
_APART: Final = 0.35  # cosine of the changes, up to which a model can be the base of the others
_SPARSE: Final = 0.3  # share of elements changed, below which averaging dilutes them
_STUDY: Final = (
    "task arithmetic is the one method of six that reliably gained over the base on language models of 3B to 8B "
    "(arXiv 2511.21437)"
)
_SUBSPACE: Final = ("tsv_m", "iso_c", "iso_cts")


@dataclass(frozen=True)
class Recipe:
    """A merge config to start from.

    Attributes:
        title: its method.
        why: what speaks for it.
        yaml: ready to paste.
    """

    title: str
    why: str
    yaml: str


@dataclass(frozen=True)
class Advice:
    """About some models.

    Attributes:
        models: one row each.
        base: the common ancestor, if it is known.
        base_from: how it is known, or how to find it.
        measured: what was compared on samples, one row a model.
        pairs: the same, one row every two models.
        problems: what keeps them from being merged as they are.
        findings: what a careful person should know.
        recipes: what to try, best first.
    """

    models: Sequence[Mapping[str, Any]]
    base: str | None
    base_from: str
    measured: Sequence[Mapping[str, Any]]
    pairs: Sequence[Mapping[str, Any]]
    problems: Sequence[str]
    findings: Sequence[str]
    recipes: Sequence[Recipe]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable mapping."""
        return asdict(self)


def advise(
    models: Sequence[Checkpoint], base: Checkpoint | None, ctx: Context, *, base_from: str = "named by --base"
) -> Advice:
    """What to know about models that might be merged.

    Args:
        models: at least two, without the base; one with it.
        base: where it is known; None: it is looked for.
        ctx: for the planner.
        base_from: how it is known.
    """
    everyone = [*models, *([base] if base is not None else [])]
    here = [model for model in everyone if not model.missing_bytes]
    findings = concerns([read_licence(m.ref, d) for m in everyone for d in m.directories])
    if away := [model.ref for model in everyone if model.missing_bytes]:
        findings.append(f"not measured, for the weights are on the hub: {', '.join(away)}; `solera diff` fetches them")
    if base is None:
        base, base_from = _base(models, here, ctx)
    others = [model for model in models if model is not base]
    problems, tokenizer, lines = _problems(others, base, ctx)
    findings += lines
    found = _measure(others, base, here, ctx) if not problems else None
    related = True
    if found is not None:
        lines, related = _relation(found, has_base=base is not None)
        findings += lines
    return Advice(
        model_rows(everyone),
        None if base is None else base.ref,
        base_from,
        [] if found is None else _totals(found),
        [] if found is None or base is None else _pairs(found),
        problems,
        findings,
        [replace(recipe, yaml=recipe.yaml + tokenizer) for recipe in _recipes(others, base, found)]
        if related and not problems
        else [],
    )


def model_rows(models: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """What each model is, and how its tokenizer differs from that of the first."""
    rows: list[dict[str, Any]] = []
    for model in models:
        facts = describe(model)
        licences = [read_licence(model.ref, directory).label for directory in model.directories]
        rows.append(
            {
                "model": model.ref,
                "licence": " + ".join(licences),
                "architecture": (facts["architectures"] or [facts["family"]])[0],
                "parameters": facts["parameters"]["total"],
                "bytes": facts["parameters"]["bytes"],
                "dtype": " ".join(facts["dtypes"]),
                "layers": facts["layers"],
                "vocabulary": facts["vocab_size"],
                "tokenizer": _tokenizer(models[0], model, facts),
            }
        )
    return rows


def method_notes(config: MergeConfig) -> list[str]:
    """What published evidence says about the method of a recipe."""
    method = config.merge_method
    if method in _SUBSPACE:
        return [
            f"{method} may lower the quality of a language model: {_STUDY}; subspace methods brought nothing or lost"
        ]
    if METHODS[method].base == "required" and method != "task_arithmetic":
        return [f"compare {method} with task_arithmetic on the same models: {_STUDY}"]
    return []


def _tokenizer(first: Checkpoint, model: Checkpoint, facts: Mapping[str, Any]) -> str:
    if facts["tokenizer"] is None:
        return "none"
    if model is first:
        return str(facts["tokenizer"]["class"] or facts["tokenizer"]["file"])
    try:
        conflict = conflicting_ids(first, model)
    except InputError as e:
        return f"unreadable: {e}"
    if conflict is None:
        mine = next((f for f in first.sidecars if f.name == facts["tokenizer"]["file"]), None)
        return "same file" if mine is not None and facts["tokenizer"]["file"] == "tokenizer.json" else "not compared"
    return f"{conflict.count} of {conflict.common} ids differ" if conflict.count else "same ids"


def _base(models: Sequence[Checkpoint], here: Sequence[Checkpoint], ctx: Context) -> tuple[Checkpoint | None, str]:
    """The base among the models, and how it is known or could be."""
    stated = {
        str(ref) for model in models for ref in _as_list(read_front_matter(model.path / "README.md").get("base_model"))
    }
    for model in models:
        if model.ref.partition("@")[0] in stated:
            return model, "named as `base_model` on the cards of the others"
    if len(here) == len(models) >= 3 and (found := _centre(models, ctx)) is not None:
        return found, "found by measurement: the others move away from it in unrelated directions"
    if stated:
        return None, f"the cards name {', '.join(sorted(stated))}: pass it as --base"
    return None, "not known: no card names one; pass it as --base if there is one"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _centre(models: Sequence[Checkpoint], ctx: Context) -> Checkpoint | None:
    """The one model from which the differences to all others are nearly at right angles, if there is exactly one."""
    centres: list[Checkpoint] = []
    for candidate in models:
        found = diff(candidate, [m for m in models if m is not candidate], sample=_SAMPLE, threads=ctx.threads)
        cosines = [row["cosine"] for row in found.pair_totals(whole).values()]
        related = all((_cosine(found, i) or 0.0) >= _RELATED for i in range(len(models) - 1))
        if related and cosines and all(c is not None and abs(c) < _APART for c in cosines):
            centres.append(candidate)
    return centres[0] if len(centres) == 1 else None


def _problems(models: Sequence[Checkpoint], base: Checkpoint | None, ctx: Context) -> tuple[list[str], str, list[str]]:
    """What an average of all would be refused for, what the recipes say about the tokenizer, and why."""
    refs = [m.ref for m in (*([base] if base is not None else []), *models)]
    recipe = {"merge_method": "linear", "models": [{"model": ref} for ref in refs], "parameters": {"weight": 1}}

    def planned(**more: Any) -> MergePlan | list[str]:
        try:
            return make_plan(parse(MergeConfig, {**recipe, **more}, where="models"), ctx)[0]
        except InputError as e:
            return str(e).splitlines()

    plain, united = planned(), planned(tokenizer={"source": "union"})
    if isinstance(united, list):  # where no union can be made, this is no way out of what keeps them apart
        return (plain if isinstance(plain, list) else []), "", []
    if "tokenizer.json" not in united.files and not isinstance(plain, list):
        return [], "", []
    why = "they cannot be merged without it" if isinstance(plain, list) else "without it the others' tokens are lost"
    lines = [f"the vocabularies differ, so the recipes have `tokenizer: {{source: union}}`: {why}"]
    lines += [warning for warning in united.warnings if "sample texts are split differently" in warning]
    return [], "tokenizer: {source: union}\n", lines


def _measure(
    models: Sequence[Checkpoint], base: Checkpoint | None, here: Sequence[Checkpoint], ctx: Context
) -> Diff | None:
    """The models against the base, else the others against the first; only those whose weights are here."""
    first, rest = (base, models) if base is not None else (models[0], models[1:])
    rest = [model for model in rest if model in here]
    if first not in here or not rest:
        return None
    return diff(first, rest, sample=_SAMPLE, threads=ctx.threads)


def _cosine(found: Diff, model: int) -> float | None:
    """Between base and model, over matrices alone (norms are near 1 in all models)."""
    total = Change()
    for tensor in found.tensors:
        if tensor.model == model and len(tensor.shape) == 2 and tensor.change is not None and tensor.change.finite:
            total += tensor.change
    return total.cosine


def _relation(found: Diff, *, has_base: bool) -> tuple[list[str], bool]:
    """Whether the models share an ancestor, and what else the figures say."""
    lines: list[str] = []
    related = True
    for i, ref in enumerate(found.models):
        cosine = _cosine(found, i)
        if cosine is None:
            continue
        if cosine < _RELATED:
            verdict = "unrelated" if cosine < _UNRELATED else "hardly related"
            lines.append(
                f"{found.base} and {ref} are {verdict}: the cosine of their weights is {cosine:.3f} (fine-tunes of one "
                "model are near 1); their average means nothing. What remains: layers stacked (passthrough), a mixture "
                "of experts, distillation"
            )
            related = False
        else:
            lines.append(f"{found.base} and {ref} share an ancestor: the cosine of their weights is {cosine:.4f}")
    totals = found.totals(whole)
    for i, ref in enumerate(found.models) if has_base else ():
        changed = totals.get((whole(""), i), {}).get("changed")
        if changed is not None and 0 < changed < _SPARSE:
            lines.append(
                f"{ref} changes only {100 * changed:.0f} % of the elements, as reinforcement learning does; averages "
                "dilute such changes, `ram` does not (arXiv 2601.13572)"
            )
    sizes = [row["relative_change"] for row in totals.values() if row["relative_change"]]
    if has_base and sizes and max(sizes) > 4 * min(sizes):
        lines.append(
            f"the changes are of very different size ({max(sizes):.2%} and {min(sizes):.2%} of the base): with equal "
            "weights the largest dominates"
        )
    return lines, related


def _totals(found: Diff) -> list[dict[str, Any]]:
    return [
        {"model": found.models[i], **{key: value for key, value in row.items() if "rank" not in key}}
        for (_, i), row in found.totals(whole).items()
    ]


def _pairs(found: Diff) -> list[dict[str, Any]]:
    return [{"a": found.models[i], "b": found.models[j], **row} for (_, i, j), row in found.pair_totals(whole).items()]


def _recipes(models: Sequence[Checkpoint], base: Checkpoint | None, found: Diff | None) -> list[Recipe]:
    if base is None:
        share = f"{math.floor(100 / len(models)) / 100:g}"
        linear = _yaml("linear", models, None, {"weight": share}, {})
        recipes = [Recipe("linear", "the average: needs no base, and is the yardstick for anything else", linear)]
        if len(models) == 2:
            slerp = _yaml("slerp", models[1:], models[0], {}, {"t": "0.5"})
            recipes.append(Recipe("slerp", "two models, along the arc between them; move t between 0 and 1", slerp))
        return recipes
    recipes = [
        Recipe(
            "task_arithmetic",
            f"{_STUDY}. 0.4 is the weight in MergeBench (arXiv 2505.10833); try 0.2 to 0.6 and let `solera eval` judge",
            _yaml("task_arithmetic", models, base, {"weight": "0.4"}, {}),
        )
    ]
    if len(models) > 1:
        conflict = [row["sign_conflict"] for row in (_pairs(found) if found is not None else [])]
        known = [c for c in conflict if c is not None]
        measured = f"the changes conflict in {100 * max(known):.0f} % of the signs; " if known else ""
        recipes.append(
            Recipe(
                "ties",
                f"{measured}ties elects one sign for each element; these are its authors' values (arXiv 2306.01708). "
                "No reliable gain in 2511.21437: keep it only if it beats task_arithmetic on your own evaluation",
                _yaml("ties", models, base, {"weight": "1", "density": "0.2"}, {"lambda": "1"}),
            )
        )
    return recipes


def _yaml(
    method: str,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    own: Mapping[str, str],
    shared: Mapping[str, str],
) -> str:
    parameters = ", ".join(f"{key}: {value}" for key, value in own.items())
    lines = [f"merge_method: {method}"]
    lines += [] if base is None else [f"base_model: {base.ref}"]
    lines += ["models:"]
    lines += [
        f"  - {{model: {model.ref}, parameters: {{{parameters}}}}}" if own else f"  - {{model: {model.ref}}}"
        for model in models
    ]
    lines += [f"parameters: {{{', '.join(f'{key}: {value}' for key, value in shared.items())}}}"] if shared else []
    formats = {info.dtype for model in models for info in model.tensors.values()}
    lines += ["dtype: bfloat16"] if formats == {"BF16"} else ["dtype: float16"] if formats == {"F16"} else []
    return "\n".join(lines) + "\n"
