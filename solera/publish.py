"""Publishing: a checked directory, private first, one commit, verified afterwards.

    assemble -> create the repository privately and check that it is -> one commit (uploads, and deletions of what an
    earlier publication left) -> compare every checksum with the hub's -> tag -> only then, where asked for, public

One commit, not `upload_folder`: with hf_xet installed that makes several (huggingface_hub 2.x), and a half-published
model would be visible in between. The token is huggingface_hub's business (HF_TOKEN or `hf auth login`); it is never
read here.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import field_validator

from solera_core.context import Context
from solera_core.errors import ConfigError, HubError, SoleraError, VerificationError
from solera_core.plan import Plan
from solera_core.progress import Silent
from solera_core.strict import Strict

if TYPE_CHECKING:
    from solera.assemble import Evidence, Release

__all__ = ["WORKING_BYTES", "CardConfig", "PublishConfig", "PublishResult", "plan_publish", "publish"]

_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*\Z")
_KEPT_BY_THE_HUB: Final = {".gitattributes"}  # made by the hub, and needed by it
WORKING_BYTES: Final = 64_000_000  # of buffers while hashing and sending


class CardConfig(Strict):
    """What the user adds to the card.

    Attributes:
        title: heading (default: the repository's name).
        summary: Markdown, shown first.
    """

    title: str | None = None
    summary: str | None = None


class PublishConfig(Strict):
    """What to publish, and how.

    Attributes:
        model: a stage of the run, or a directory that solera made.
        repo: `name/model` on the hub at HF_ENDPOINT; None: the publishable directory is made, nothing is uploaded.
        private: the repository stays private. False: it is made public after everything is verified.
        license: identifier of the output's licence; needed where the parents disagree or are unknown.
        when: an eval stage; published only if its gate says PASS.
        tag: tag the commit.
        card: title and summary.
    """

    model: str
    repo: str | None = None
    private: bool = True
    license: str | None = None
    when: str | None = None
    tag: str | None = None
    card: CardConfig = CardConfig()

    @field_validator("repo")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None and (
            not _REPO.match(value) or ".." in value or "--" in value or value.endswith((".git", "-", "."))
        ):
            raise ValueError(f"{value!r} is no repository on a hub; it is called name/model")
        return value

    @field_validator("license")
    @classmethod
    def _known_licence(cls, value: str | None) -> str | None:
        from solera.licences import check_licence_id

        try:
            return None if value is None else check_licence_id(value)
        except ConfigError as e:
            raise ValueError(str(e).removeprefix("license: ")) from e

    @field_validator("tag")
    @classmethod
    def _well_formed_tag(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value):
            raise ValueError(f"{value!r} is no tag; use letters, digits, dots and dashes, e.g. v1.0")
        return value


@dataclass(frozen=True)
class PublishResult:
    """What was published.

    Attributes:
        url: of the repository; None when nothing was uploaded, for no repository was named.
        commit: its id.
        files: names of all files of the model.
        changed: False when the hub had exactly this already, so that no commit was made.
        private: whether only its owner sees it.
        tag: of the commit.
    """

    url: str | None
    commit: str | None
    files: tuple[str, ...]
    changed: bool
    private: bool
    tag: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def plan_publish(config: PublishConfig, ctx: Context, *, evidence: "Evidence | None" = None) -> Plan:
    """What would be uploaded, what would stay, the licences and the card's head. Asks no hub, writes nothing.

    Raises:
        InputError: whatever `publish` would refuse without the hub; only it compares the digests of the weights.
    """
    from solera.assemble import prepare
    from solera.card import base_model_relation
    from solera.lineage import hub_parents

    release = prepare(config, ctx, evidence)
    parents = hub_parents(release.facts.lineage)
    return Plan(
        stage="publish",
        reads=[
            {"what": str(release.directory), "bytes": sum(f.size for f in release.files if f.source is not None)},
            *({"what": p.parent, "licence": p.label, "read from": p.source} for p in release.licence.parents),
        ],
        writes=[{"what": file.name, "bytes": file.size} for file in release.files],
        memory_bytes=WORKING_BYTES,
        disk_bytes=sum(f.size for f in release.files if not f.name.endswith(".safetensors")),
        parameters={
            "repo": config.repo,
            "endpoint": os.environ.get("HF_ENDPOINT", "the hub's own"),
            "private": config.private,
            "tag": config.tag,
            "when": config.when,
            "license": release.licence.id,
            "base_model": parents,
            "base_model_relation": base_model_relation(release.facts.kind, parents),
            "title": release.facts.title,
            "card": "your own README.md" if release.own_card else "written",
        },
        rows=[
            *(
                {"file": f.name, "action": "upload", "why": "written" if f.content is not None else ""}
                for f in release.files
            ),
            *({"file": name, "action": "stays here", "why": why} for name, why in release.left_out),
        ],
        warnings=list(release.warnings),
    )


def publish(
    config: PublishConfig, ctx: Context, *, evidence: "Evidence | None" = None, out: Path | None = None
) -> PublishResult:
    """Upload a checkpoint with its card to the hub at HF_ENDPOINT and check what arrived.

    Args:
        config: what and where to. Without a repository the publishable directory is written, and that is all.
        ctx: where the model resolves.
        evidence: results, verdict, recipe and report of the run.
        out: keep the publishable directory there (default: it is temporary).

    Raises:
        InputError, VerificationError: as `assemble`; nothing was uploaded.
        VerificationError: the gate did not pass; or the hub holds something else than was sent.
        HubError: the hub cannot be reached or refuses; the message says what to do.
    """
    from solera.assemble import assemble

    if config.repo is None and out is None:
        raise ConfigError("publish: `repo` is not given; name the repository (name/model) to upload to")
    _check_gate(config, evidence)
    with _place_for(out, config, ctx) as directory:
        ctx.progress.note(f"publish: checking {config.model}")
        release = assemble(config, directory, ctx, evidence)
        for warning in release.warnings:
            ctx.progress.note(f"publish: {warning}")
        if config.repo is None:
            return PublishResult(None, None, tuple(f.name for f in release.files), changed=False, private=True)
        return _upload(directory, release, config.repo, config, ctx)


def _check_gate(config: PublishConfig, evidence: "Evidence | None") -> None:
    if config.when is None:
        return
    if evidence is None or evidence.verdict is None:
        raise ConfigError(f"publish: `when: {config.when}` needs the verdict of a run; use `solera run`")
    import json

    verdict = json.loads(evidence.verdict.read_text(encoding="utf-8")).get("verdict")
    if verdict != "PASS":
        raise VerificationError(f"publish: {config.when} says {verdict}, so {config.model} is not published")


@contextmanager
def _place_for(out: Path | None, config: PublishConfig, ctx: Context) -> Iterator[Path]:
    """`out`, or a directory beside the checkpoint (where its weights can be hard-linked) that is removed afterwards."""
    if out is not None:
        yield out
        return
    beside = ctx.models.get(config.model, ctx.base_dir / Path(config.model).expanduser()).absolute().parent
    home = beside if os.access(beside, os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix=".solera-publish-", dir=home))
    try:
        yield scratch / "release"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# the hub ----------------------------------------------------------------------------------------------------------


def _upload(directory: Path, release: "Release", repo: str, config: PublishConfig, ctx: Context) -> PublishResult:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    names = [file.name for file in release.files]
    with _explained(repo, api.endpoint), _quiet(ctx):
        api.create_repo(repo, private=True, exist_ok=True)  # ignored where it exists: so it is looked at
        before = api.repo_info(repo)
        if config.private and before.private is not True:
            raise HubError(
                f"{repo} on {api.endpoint} is not private, though that was asked for; nothing was uploaded. Make it "
                "private in its settings, choose another name, or pass --public"
            )
        _check_tag(api, repo, config.tag, before.sha)
        stale = sorted(set(api.list_repo_files(repo)) - set(names) - _KEPT_BY_THE_HUB)
        size = sum(file.size for file in release.files)
        ctx.progress.note(f"publish: {len(names)} files, {size / 1e6:.1f} MB, to {api.endpoint}/{repo}")
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in names),
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
            ],
            commit_message=f"solera: {release.facts.kind} {str(release.facts.record['digest'])[:19]}",
            parent_commit=before.sha,
        )
        found = api.verify_repo_checksums(repo, revision=commit.oid, local_dir=directory)
        strange = sorted(set(found.missing_paths) - _KEPT_BY_THE_HUB)
        if found.mismatches or found.extra_paths or strange:
            wrong = [m["path"] for m in found.mismatches] + list(found.extra_paths) + strange
            raise VerificationError(
                f"{repo} at {commit.oid}: the hub does not hold what was sent ({', '.join(wrong[:5])}); publish again, "
                "and do not use this commit"
            )
        if config.tag is not None and config.tag not in _tags(api, repo):
            api.create_tag(repo, tag=config.tag, revision=commit.oid)
        if not config.private and before.private:
            api.update_repo_settings(repo, private=False)
    return PublishResult(
        url=f"{api.endpoint}/{repo}",
        commit=commit.oid,
        files=tuple(names),
        changed=commit.oid != before.sha,
        private=config.private,
        tag=config.tag,
    )


def _tags(api: Any, repo: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}


def _check_tag(api: Any, repo: str, tag: str | None, head: str | None) -> None:
    """Refuse a tag that names an older commit: what it stands for must not change under those who use it."""
    taken = _tags(api, repo).get(tag) if tag is not None else None
    if taken is not None and taken != head:
        raise HubError(
            f"{repo}: tag {tag!r} names commit {taken[:12]} already; nothing was uploaded. Choose another tag"
        )


@contextmanager
def _quiet(ctx: Context) -> Iterator[None]:
    """No bars of huggingface_hub's own where the caller wants silence."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not isinstance(ctx.progress, Silent) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(repo: str, endpoint: str) -> Iterator[None]:
    """Errors of huggingface_hub and its transports as HubError, with what to do."""
    try:
        yield
    except (SoleraError, AssertionError, TypeError, AttributeError, KeyError):
        raise  # ours, or a bug
    except Exception as e:  # httpx, hf_xet and huggingface_hub share no base class
        raise HubError(f"{repo} on {endpoint}: {_explanation(e, repo)}") from e


def _explanation(e: Exception, repo: str) -> str:
    text = _redacted(_messages(e))
    status = next((s for s in map(_status, _causes(e)) if s is not None), None)
    owner = repo.partition("/")[0]
    if "xet-write-token" in text and "404" in text:
        return (
            "this hub has no Xet storage, and huggingface_hub does not fall back by itself: set HF_HUB_DISABLE_XET=1 "
            "and publish again"
        )
    if any(type(x).__name__ == "OfflineModeIsEnabled" for x in _causes(e)):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it and publish again"
    if any(type(x).__name__ == "LocalTokenNotFoundError" for x in _causes(e)) or status == 401:
        return "no valid token: set HF_TOKEN to one that may write, or run `hf auth login`, and publish again"
    if status == 403:
        return f"the token may not write to {owner}, or its storage is full: {_first_line(text)}"
    if status == 404:
        return f"not found: does {owner} exist there, and may the token see it? {_first_line(text)}"
    if status == 412:
        return (
            "somebody else changed the repository meanwhile; nothing was changed by this run. Look, and publish again"
        )
    if "Invalid metadata in README.md" in text:
        return f"the hub refuses the card: {' '.join(text.split())}"
    if status is not None:
        return f"the hub answered {status}: {_first_line(text)}. Publish again; what arrived is not sent twice"
    if any("Connect" in type(x).__name__ or isinstance(x, ConnectionError) for x in _causes(e)):
        return f"cannot be reached ({_first_line(text)}); check the network and HF_ENDPOINT"
    return f"upload failed: {_first_line(text)}. Publish again; what arrived is not sent twice"


def _causes(e: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = e
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _status(e: BaseException) -> int | None:
    status = getattr(getattr(e, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _messages(e: Exception) -> str:
    return "\n".join(f"{type(x).__name__}: {x}" for x in _causes(e))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:300]


def _redacted(text: str) -> str:
    """No token in a message, wherever it may have come from."""
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_***", re.sub(r"(?i)(bearer )\S+", r"\1***", text))
