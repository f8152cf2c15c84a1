"""The publishable directory: what may leave the machine of a checkpoint, its card, its evidence, and nothing else.

    prepare     decides, reads small files only, writes nothing: what goes, what stays and why, the card, the licences
    assemble    writes it: weights as hard links where the file system allows, everything else as copies, then verified

An allow-list, not an ignore-list: a file of a kind that is not named here stays at home.
"""

import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from solera.card import MARK, CardFacts, read_config, render_card
from solera.leaks import Leak, scan_bytes, scan_file
from solera.licences import LicenceReport, settle
from solera.lineage import Ancestor, sources, trace
from solera.results import ModelResults, read_results
from solera_core.context import Context
from solera_core.digest import file_sha256
from solera_core.errors import CheckpointError, ConfigError, DataError, InputError, VerificationError
from solera_core.licence import Licence, read_front_matter, read_licence
from solera_core.provenance import FILE_NAME, read_provenance, verify
from solera_core.sidecars import PATTERNS as SIDECARS
from solera_core.sidecars import TOKENIZER_FILES, tokenizer_files
from solera_core.staging import check_apart, staged

if TYPE_CHECKING:
    from solera.publish import PublishConfig

__all__ = ["Evidence", "Release", "ReleaseFile", "assemble", "is_evidence", "prepare"]

# Patterns are matched against the path relative to the directory, and `*` does not cross a slash.
_MODEL: Final = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *SIDECARS,
    "mergekit_config.yml",
    "mergekit_moe_config.yml",
)
# These may stand beside a checkpoint without being in its solera.json: people put them there.
_BESIDE: Final = (
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "report.html",
    "recipe.yml",
    "results.json",
    "verdict.json",
    ".eval_results/*.yaml",
)
_LICENCE_TEXTS: Final = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_TEXT_LIMIT: Final = 1_000_000  # bytes of a licence text; a longer file of that name is something else
_WEIGHTS: Final = ".safetensors"


@dataclass(frozen=True)
class Evidence:
    """What a run knows of a model beside its directory.

    Attributes:
        results: model name -> directory with its results.json; for the card's table.
        model: the key in `results` that is the model published (default: the only one).
        verdict: a verdict.json.
        recipe: the recipe of the run.
        report: its report.html.
    """

    results: Mapping[str, Path] = field(default_factory=dict[str, Path])
    model: str | None = None
    verdict: Path | None = None
    recipe: Path | None = None
    report: Path | None = None


@dataclass(frozen=True)
class ReleaseFile:
    """One file of the release: copied from `source`, or written from `content`."""

    name: str
    size: int
    source: Path | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Release:
    """What `prepare` decided.

    Attributes:
        directory: the checkpoint.
        files: what goes, by name.
        left_out: (name, why) of what stays.
        licence: as settled.
        facts: what the card says.
        own_card: the README.md is the user's own and goes as it is.
        warnings: what a careful person would want to know first.
    """

    directory: Path
    files: tuple[ReleaseFile, ...]
    left_out: tuple[tuple[str, str], ...]
    licence: LicenceReport
    facts: CardFacts
    own_card: bool
    warnings: tuple[str, ...]


def prepare(config: "PublishConfig", ctx: Context, evidence: Evidence | None = None) -> Release:
    """Decide what is published; reads small files and headers only, asks no hub, writes nothing.

    Raises:
        CheckpointError: no such directory, or not made by solera.
        InputError: a symbolic link, a secret, a licence that forbids it or licences that disagree.
        DataError: evidence that cannot be read, or that is about another model.
        ConfigError: a licence that is none.
        CheckpointError: a causal language model without a tokenizer.
    """
    evidence = evidence or Evidence()
    directory = _directory(config.model, ctx)
    record = read_provenance(directory)
    found, left_out = _choose(directory, record)
    lineage = trace(directory, config.model if config.model in ctx.models else directory.name, ctx)
    parents = sources(lineage)
    card_file = directory / "README.md"
    own_card = card_file.is_file() and MARK not in card_file.read_text(encoding="utf-8", errors="replace")
    chosen = _chosen_licence(config.license, card_file if own_card else None)
    licence = settle([_licence(p) for p in parents], chosen, repo=config.repo)
    facts = _facts(config, directory, record, lineage, licence, evidence)
    _require_tokenizer(directory, facts.config, found)

    files = {name: ReleaseFile(name, (directory / name).stat().st_size, directory / name) for name in found}
    for name, source in _evidence_files(evidence, facts).items():
        files[name] = ReleaseFile(name, source.stat().st_size, source)
    for name, source in _licence_texts(parents, found).items():
        files[name] = ReleaseFile(name, source.stat().st_size, source)
    if not own_card:
        card = render_card(facts).encode()
        files["README.md"] = ReleaseFile("README.md", len(card), content=card)
    provenance = _provenance(record, files)
    files[FILE_NAME] = ReleaseFile(FILE_NAME, len(provenance), content=provenance)
    ordered = tuple(files[name] for name in sorted(files))
    _refuse_leaks(directory, ordered)
    return Release(
        directory,
        ordered,
        tuple(left_out),
        licence,
        facts,
        own_card,
        tuple(_warnings(facts, licence, own_card, left_out)),
    )


def assemble(config: "PublishConfig", out: Path, ctx: Context, evidence: Evidence | None = None) -> Release:
    """Write the publishable directory at `out`, whole and verified, and return what it holds.

    Raises:
        InputError: as `prepare`; or the target is in the way.
        VerificationError: the checkpoint is not what its solera.json says.
    """
    release = prepare(config, ctx, evidence)
    check_apart(out, [release.directory])
    with staged(out, overwrite=ctx.overwrite) as staging:
        for file in release.files:
            target = staging / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.content is not None:
                target.write_bytes(file.content)
            elif file.source is not None:
                _place(file.source, target)
        problems = verify(staging)
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise VerificationError(
                f"{release.directory}: is not what its {FILE_NAME} says: {'; '.join(problems[:5])}{more}. It was "
                "changed after it was made, or the disk lost it: build it again"
            )
    return release


def is_evidence(name: str) -> bool:
    """Whether a file of a release tells of the model (card, licences, results, recipe) and is no part of it."""
    return _matches(name, _BESIDE)


def _directory(model: str, ctx: Context) -> Path:
    directory = ctx.models.get(model, ctx.base_dir / Path(model).expanduser())
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; publish takes a checkpoint that solera made")
    return directory


def _require_tokenizer(directory: Path, config: Mapping[str, Any], found: list[str]) -> None:
    """Nobody can use a language model without its tokenizer, nor tell which one is meant."""
    causal = any(re.search(r"ForCausalLM|LMHeadModel", name) for name in config.get("architectures") or ())
    if causal and not tokenizer_files(found):
        raise CheckpointError(
            f"{directory}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}), so nobody could use the model; "
            "copy the tokenizer files of its base into the models that it was made from (for a merge, or set "
            "`tokenizer_source`), and make it again"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            return True
    return False


def _choose(directory: Path, record: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    """(names that go, (name, why) that stay). Symbolic links are refused, wherever they lead."""
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            raise InputError(
                f"{path}: is a symbolic link; what it leads to would be uploaded. Replace it by the file, or remove it"
            )
        if not path.is_file() or name == FILE_NAME:
            continue
        if not _matches(name, (*_MODEL, *_BESIDE)):
            left_out.append((name, "not a kind of file that is published"))
        elif _matches(name, _MODEL) and not name.endswith(_WEIGHTS) and name not in record["files"]:
            raise VerificationError(
                f"{path}: is part of the model, but not in its {FILE_NAME}; it was added after the model was made. "
                "Remove it, or make the model with it"
            )
        else:
            found.append(name)
    return found, left_out


def _licence(parent: Ancestor) -> Licence:
    return read_licence(parent.hub_id or parent.name, parent.directory)


def _chosen_licence(given: str | None, own_card: Path | None) -> str | None:
    """The licence the user chose: with --license, or in a card of their own."""
    written = read_front_matter(own_card).get("license") if own_card is not None else None
    if written is None:
        return given
    if given is not None and given != written:
        raise ConfigError(f"{own_card}: says `license: {written}`, but --license says {given}; make them agree")
    return str(written)


def _facts(
    config: "PublishConfig",
    directory: Path,
    record: Mapping[str, Any],
    lineage: Ancestor,
    licence: LicenceReport,
    evidence: Evidence,
) -> CardFacts:
    results = {name: read_results(path) for name, path in evidence.results.items()}
    model = evidence.model or (next(iter(results)) if len(results) == 1 else None)
    if results:
        _check_about(results, model, record)
    name = (config.repo or directory.absolute().name).rpartition("/")[2]
    return CardFacts(
        title=config.card.title or name,
        summary=config.card.summary or "",
        repo=config.repo,
        kind=str(record["kind"]),
        lineage=lineage,
        licence=licence,
        record=record,
        config=read_config(directory),
        results=results,
        model=model,
        verdict=_json(evidence.verdict) if evidence.verdict else None,
        recipe=evidence.recipe.read_text(encoding="utf-8") if evidence.recipe else None,
        has_report=evidence.report is not None or (directory / "report.html").is_file(),
    )


def _check_about(results: Mapping[str, ModelResults], model: str | None, record: Mapping[str, Any]) -> None:
    """Refuse results that were measured on another model: a card must not boast with them."""
    if model is None or model not in results:
        raise DataError(f"which of the results ({', '.join(results)}) are the published model's is not said: {model!r}")
    measured = results[model].digest
    if measured and measured != record["digest"]:
        raise DataError(
            f"results of {model!r}: were measured on {measured[:23]}..., but the model is "
            f"{str(record['digest'])[:23]}...; evaluate it again"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(found, dict) or "verdict" not in found:
        raise DataError(f"{path}: holds no verdict")
    return found


def _evidence_files(evidence: Evidence, facts: CardFacts) -> dict[str, Path]:
    results = None
    if facts.model is not None:
        path = evidence.results[facts.model]
        results = path / "results.json" if path.is_dir() else path
    named = {
        "results.json": results,
        "verdict.json": evidence.verdict,
        "recipe.yml": evidence.recipe,
        "report.html": evidence.report,
    }
    return {name: source for name, source in named.items() if source is not None}


def _licence_texts(parents: list[Ancestor], present: list[str]) -> dict[str, Path]:
    """Licence, notice and policy texts of the parents, which most licences want shipped along."""
    texts: dict[str, Path] = {}
    for parent in parents:
        if parent.directory is None:
            continue
        for file in sorted(p for pattern in _LICENCE_TEXTS for p in parent.directory.glob(pattern)):
            if not file.is_file() or file.stat().st_size > _TEXT_LIMIT:
                continue
            same = [t for t in texts.values() if t.read_bytes() == file.read_bytes()]
            if same:
                continue
            name = file.name
            if name in texts or name in present:
                slug = re.sub(r"[^A-Za-z0-9.]+", "-", parent.hub_id or parent.name).strip("-")
                name = f"{file.stem}-{slug}{file.suffix}"
            texts.setdefault(name, file.resolve())  # snapshots in the hub's cache are links into it
    return texts


def _provenance(record: Mapping[str, Any], files: Mapping[str, ReleaseFile]) -> bytes:
    """solera.json of the release: the checkpoint's own, its list of files extended by card and evidence."""
    digests: dict[str, str] = {}
    recorded = record["files"]
    for name, file in files.items():
        if name.endswith(_WEIGHTS) or name == FILE_NAME:
            continue
        if name in recorded and not _matches(name, _BESIDE):
            digests[name] = recorded[name]  # not hashed anew: `verify` is to find out if it changed
        elif file.content is not None:
            digests[name] = hashlib.sha256(file.content).hexdigest()
        elif file.source is not None:
            digests[name] = file_sha256(file.source)
    content = {**record, "files": {name: digests[name] for name in sorted(digests)}}
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _refuse_leaks(directory: Path, files: tuple[ReleaseFile, ...]) -> None:
    leaks: list[Leak] = []
    for file in files:
        if file.content is not None:
            leaks += scan_bytes(file.content, file.name)
        elif file.source is not None:
            leaks += scan_file(file.source, file.name)
    if leaks:
        listed = "; ".join(map(str, leaks[:8])) + (f" (and {len(leaks) - 8} more)" if len(leaks) > 8 else "")
        raise InputError(
            f"{directory}: would publish what should stay private: {listed}. Take it out (and revoke a key that was "
            "ever uploaded); for paths, write them relative to the recipe and build again"
        )


def _warnings(facts: CardFacts, licence: LicenceReport, own_card: bool, left_out: list[tuple[str, str]]) -> list[str]:
    warnings = [*licence.findings, *licence.advice]
    if own_card:
        warnings.append("README.md is your own and goes as it is; delete it to have one written.")
    if not facts.results:
        warnings.append("No evaluation is given, so the card shows no measured quality.")
    if facts.verdict is not None and facts.verdict.get("verdict") != "PASS":
        warnings.append(f"The gate says {facts.verdict.get('verdict')}.")
    if left_out:
        named = ", ".join(name for name, _ in left_out[:5])
        warnings.append(f"{len(left_out)} files stay here: {named}{' ...' if len(left_out) > 5 else ''}")
    return warnings


def _place(source: Path, target: Path) -> None:
    """A hard link for weights, which nobody edits in place, where the file system has them; else a copy."""
    if source.suffix == _WEIGHTS:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without hard links
            pass
        else:
            return
    shutil.copyfile(source, target)
