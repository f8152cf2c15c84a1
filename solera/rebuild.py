"""`solera verify --rebuild`: make a checkpoint again from the recipe in its solera.json and compare every byte."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from solera.assemble import is_evidence
from solera.recipe_dir import read_recipe_dir
from solera.stages import KINDS, parse_settings, plan_stage, run_stage
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.digest import file_sha256
from solera_core.errors import CheckpointError
from solera_core.hub import resolve, split_adapter
from solera_core.lora import is_adapter, open_stored
from solera_core.plan import Plan
from solera_core.provenance import BASE_DIR_FILE, FILE_NAME, read_provenance
from solera_core.raw import is_weight_file, open_values
from solera_core.strict import Strict

__all__ = ["Rebuilt", "plan_rebuild", "rebuild"]


@dataclass(frozen=True)
class Rebuilt:
    """What came of making a directory again.

    Attributes:
        problems: what differs; none: every file of the model is equal.
        evidence: files of a release that tell of the model and were not made again: card, licences, results, report.
    """

    problems: tuple[str, ...]
    evidence: tuple[str, ...] = ()


def rebuild(directory: Path, ctx: Context) -> Rebuilt:
    """Run the stage that made `directory` again, and compare every byte.

    Inputs are found as the recipe names them: a stage of the same run stands beside `directory`; other references
    resolve as they did. An input whose content is no longer what went in is a problem of its own. Of a publishable
    directory the model is compared: weights, config, tokenizer and all else that its stage made and that was published.

    Raises:
        CheckpointError: no provenance, or an input cannot be found.
    """
    record, config, here = _prepare(directory, ctx)
    problems: list[str] = []
    for item in record["inputs"]:
        if item["digest"].startswith(("blake3:", "sampled:")):
            sampled = item["digest"].startswith("sampled:")
            now = _digest_now(item["ref"], here, merged=record["kind"] in ("merge", "extract-lora"), sampled=sampled)
            if now != item["digest"]:
                problems.append(f"input {item['ref']} has changed: {item['digest'][:23]}... then, {now[:23]}... now")
    if problems:
        return Rebuilt(tuple(problems))
    evidence = tuple(name for name in sorted(record["files"]) if is_evidence(name))
    with tempfile.TemporaryDirectory(prefix="solera-rebuild-") as scratch:
        again = run_stage(record["kind"], config, Path(scratch) / "again", here)
        problems = _release_differences(directory, again) if evidence else _differences(directory, again)
    return Rebuilt(tuple(problems), evidence)


def _digest_now(ref: str, ctx: Context, *, merged: bool, sampled: bool) -> str:
    whole = split_adapter(ref, ctx) is None and not is_weight_file(ref, ctx)
    if whole and is_adapter(resolve(ref, ctx, weights="later").path):
        return open_stored(ref, ctx).digest()
    checkpoint = open_values(ref, ctx) if merged else open_checkpoint(ref, ctx)
    return checkpoint.identity() if sampled else checkpoint.digest()


def plan_rebuild(directory: Path, ctx: Context) -> Plan:
    """What making `directory` again would read, write and need.

    Raises:
        CheckpointError: no provenance, or an input cannot be found.
    """
    record, config, here = _prepare(directory, ctx)
    return plan_stage(record["kind"], config, here)


def _prepare(directory: Path, ctx: Context) -> tuple[dict[str, Any], Strict, Context]:
    """The record, the settings in it, and the surroundings in which their references resolve as they did."""
    record = read_provenance(directory)
    kind = record["kind"]
    if kind not in KINDS:
        raise CheckpointError(f"{directory}: made by a stage of kind {kind!r}, which cannot be run again")
    siblings = {
        p.name: p
        for p in directory.absolute().parent.iterdir()
        if ((p / "config.json").exists() or is_adapter(p)) and p != directory.absolute()
    }
    here = replace(
        ctx,
        seed=record["seed"],
        models={**siblings, **ctx.models},
        base_dir=read_recipe_dir(directory) or ctx.base_dir,
        compat=record.get("compat", {}).get("with"),
    )
    return record, parse_settings(kind, record["recipe"], where=f"{directory}/solera.json: recipe"), here


def _differences(a: Path, b: Path) -> list[str]:
    files_a = {str(p.relative_to(a)) for p in a.rglob("*") if p.is_file()} - {BASE_DIR_FILE}
    files_b = {str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()} - {BASE_DIR_FILE}
    problems = [f"{name} is not made by the recipe" for name in sorted(files_a - files_b)]
    problems += [f"{name} is missing" for name in sorted(files_b - files_a)]
    problems += [
        f"{name} differs from what the recipe makes now"
        for name in sorted(files_a & files_b)
        if file_sha256(a / name) != file_sha256(b / name)
    ]
    return problems


def _release_differences(release: Path, again: Path) -> list[str]:
    """As `_differences`, for a release: evidence was added, what is not published left out, the record says so."""
    ours, theirs = read_provenance(release), read_provenance(again)
    model = {str(p.relative_to(release)) for p in release.rglob("*") if p.is_file()} - {FILE_NAME}
    model = {name for name in model if not is_evidence(name)}
    problems = [f"{name} is not made by the recipe" for name in sorted(model) if not (again / name).is_file()]
    problems += [
        f"{name} differs from what the recipe makes now"
        for name in sorted(model)
        if (again / name).is_file() and file_sha256(release / name) != file_sha256(again / name)
    ]
    problems += [f"tensor {name} is missing" for name in sorted(theirs["tensors"].keys() - ours["tensors"].keys())]
    problems += [
        f"{FILE_NAME}: {key} differs from what the recipe makes now"
        for key in sorted(theirs.keys() | ours.keys())
        if key != "files" and ours.get(key) != theirs.get(key)
    ]
    return problems
