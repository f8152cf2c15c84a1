"""`solera verify --rebuild`: make a checkpoint again from the recipe in its solera.json and compare every byte."""

import tempfile
from dataclasses import replace
from pathlib import Path

from solera.recipe_dir import read_recipe_dir
from solera.stages import KINDS, run_stage, stage_config
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.digest import file_sha256
from solera_core.errors import CheckpointError
from solera_core.provenance import read_provenance
from solera_core.strict import parse

__all__ = ["rebuild_problems"]


def rebuild_problems(directory: Path, ctx: Context) -> list[str]:
    """What differs between `directory` and the same stage run again; [] means every file is equal.

    Inputs are found as the recipe names them: a stage of the same run stands beside `directory`; other references
    resolve as they did. An input whose content is no longer what went in is a problem of its own.

    Raises:
        CheckpointError: no provenance, or an input cannot be found.
    """
    record = read_provenance(directory)
    kind = record["kind"]
    if kind not in KINDS:
        raise CheckpointError(f"{directory}: made by a stage of kind {kind!r}, which cannot be run again")
    siblings = {
        p.name: p
        for p in directory.absolute().parent.iterdir()
        if (p / "config.json").exists() and p != directory.absolute()
    }
    here = replace(
        ctx,
        seed=record["seed"],
        models={**siblings, **ctx.models},
        base_dir=read_recipe_dir(directory) or ctx.base_dir,
        compat=record.get("compat", {}).get("with"),
    )
    problems: list[str] = []
    for item in record["inputs"]:
        if item["digest"].startswith(("blake3:", "sampled:")):
            checkpoint = open_checkpoint(item["ref"], here)
            now = checkpoint.digest() if item["digest"].startswith("blake3:") else checkpoint.identity()
            if now != item["digest"]:
                problems.append(f"input {item['ref']} has changed: {item['digest'][:23]}... then, {now[:23]}... now")
    if problems:
        return problems
    config = parse(stage_config(kind), record["recipe"], where=f"{directory}/solera.json: recipe")
    with tempfile.TemporaryDirectory(prefix="solera-rebuild-") as scratch:
        again = run_stage(kind, config, Path(scratch) / "again", here)
        return _differences(directory, again)


def _differences(a: Path, b: Path) -> list[str]:
    files_a = {str(p.relative_to(a)) for p in a.rglob("*") if p.is_file()}
    files_b = {str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()}
    problems = [f"{name} is not made by the recipe" for name in sorted(files_a - files_b)]
    problems += [f"{name} is missing" for name in sorted(files_b - files_a)]
    problems += [
        f"{name} differs from what the recipe makes now"
        for name in sorted(files_a & files_b)
        if file_sha256(a / name) != file_sha256(b / name)
    ]
    return problems
