"""A route on disk: which of several whole models answers a request. Fitted by `solera_merge.route`, read by everyone.

    route.json         the method, the base and the specialists by reference and digest, the small settings
    route.safetensors  mean, scale (D): of the feature; weight (R, D), bias (R): of the decision (no cascade has them)
    base-dir           the way from here to the folder that relative references start from: a hint that may be wrong,
                       for nothing is believed whose digest is not the recorded one

A request is text. The feature routers take h, the mean of the base's last hidden states over the first tokens of the
request (BOS left out: its state is alike for all), x = u / |u| with u = (h - mean) / scale, and the row r with the
largest x . weight[r] + bias[r]; `choice[r]` is the specialist. Nearest centroids, k-means cells and a linear
classifier are all of this form. A cascade asks the specialists in `order`; the first whose confidence in the request
reaches its threshold gets it, the last takes what is left.

N requests, D width of the base, R rows.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import Document, Text
from solera_core.errors import CheckpointError, ConfigError
from solera_core.hub import is_hub_id
from solera_core.provenance import BASE_DIR_FILE
from solera_core.strict import did_you_mean

__all__ = [
    "Loader",
    "Route",
    "confidences",
    "directions",
    "find_route",
    "mean_states",
    "open_route",
    "request_of",
    "write_route",
]

_FILE: Final = "route.json"
_MATRICES: Final = "route.safetensors"
_BATCH_TOKENS: Final = 4096

Array = np.ndarray
Loaded = tuple[Any, Any]  # model, tokenizer


class Loader:
    """Loads models when they are asked for, and holds the `keep` last used (None: all)."""

    def __init__(self, ctx: Context, *, dtype: str = "float32", device: str = "cpu", keep: int | None = None) -> None:
        self._ctx, self._dtype, self._device, self._keep = ctx, dtype, device, keep
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()

    def __call__(self, checkpoint: Checkpoint) -> Loaded:
        """(model, tokenizer) of a checkpoint.

        Raises:
            CheckpointError: transformers cannot load it, or it has no tokenizer.
        """
        import sys

        from solera_core.causal_lm import load_model, load_tokenizer
        from solera_core.fold import loadable

        if checkpoint.ref not in self._loaded:
            while self._keep is not None and len(self._loaded) >= self._keep:
                self._loaded.popitem(last=False)  # before the next one is loaded
            ctx = self._ctx
            tokenizer: Any = load_tokenizer(checkpoint.path, trust_remote_code=ctx.trust_remote_code)
            tokenizer.model_max_length = sys.maxsize  # long requests are cut here: its warning would mislead
            with loadable(checkpoint) as path:
                model: Any = load_model(
                    path, dtype=self._dtype, trust_remote_code=ctx.trust_remote_code, allow_pickle=ctx.allow_pickle
                )
            self._loaded[checkpoint.ref] = (model.to(self._device), tokenizer)
        self._loaded.move_to_end(checkpoint.ref)
        return self._loaded[checkpoint.ref]


@dataclass(frozen=True)
class Route:
    """A route, opened by `open_route`; its models are known by their headers only.

    Attributes:
        directory: of the route.
        specialists: by name, in the order of the route.
        base: what makes the feature; None of a cascade.
        content: of route.json.
    """

    directory: Path
    specialists: Mapping[str, Checkpoint]
    base: Checkpoint | None
    content: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the specialists."""
        return tuple(self.specialists)

    @property
    def directories(self) -> list[Path]:
        """All that is read from."""
        models = [*self.specialists.values(), *([self.base] if self.base is not None else [])]
        return [self.directory, *(directory for model in models for directory in model.directories)]

    def specialist(self, name: str) -> Checkpoint:
        """The specialist of that name. Raises ConfigError for an unknown one."""
        if name not in self.specialists:
            raise ConfigError(f"{name!r} is no specialist of {self.directory}{did_you_mean(name, self.names)}")
        return self.specialists[name]

    def require_unchanged(self) -> None:
        """Raise CheckpointError when a model's content is no longer what the route was fitted to; all are named."""
        recorded = [(f"specialist {s['name']!r}", self.specialists[s["name"]], s) for s in self.content["specialists"]]
        if self.base is not None:
            recorded.append(("the base", self.base, self.content["base"]))
        changed: list[str] = []
        for what, model, record in recorded:
            then = record["digest"]
            now = model.identity() if then.startswith("sampled:") else model.digest()
            if now != then:
                changed.append(f"{what} ({model.path}) has changed: {then[:23]}... then, {now[:23]}... now")
        if changed:
            raise CheckpointError(
                f"{self.directory}: {'; '.join(changed)}. Put the old weights back, or fit the route again "
                "(solera route)"
            )

    def assign(self, requests: Sequence[str], load: Callable[[Checkpoint], Loaded]) -> list[str]:
        """The name of the specialist for every request.

        Raises:
            CheckpointError: the base or a specialist cannot be loaded.
        """
        if not requests:
            return []
        content = self.content
        longest = int(content["request_tokens"])
        if content["method"] == "cascade":
            return self._cascade(requests, load, longest)
        assert self.base is not None  # open_route has checked it
        model, tokenizer = load(self.base)
        matrices = _read_matrices(self.directory)
        x_ND = directions(mean_states(model, tokenizer, requests, tokens=longest), matrices["mean"], matrices["scale"])
        rows_N = (x_ND @ matrices["weight"].T + matrices["bias"]).argmax(axis=1)
        return [self.names[content["choice"][row]] for row in rows_N]

    def _cascade(self, requests: Sequence[str], load: Callable[[Checkpoint], Loaded], longest: int) -> list[str]:
        order, thresholds = self.content["order"], self.content["thresholds"]
        answer = [self.names[order[-1]]] * len(requests)
        left = list(range(len(requests)))
        for e, threshold in zip(order[:-1], thresholds, strict=True):
            model, tokenizer = load(self.specialists[self.names[e]])
            sure = confidences(
                model, tokenizer, [requests[i] for i in left], tokens=longest, kind=self.content["confidence"]
            )
            for i, value in zip(left, sure, strict=True):
                if value >= threshold:
                    answer[i] = self.names[e]
            left = [i for i, value in zip(left, sure, strict=True) if value < threshold]
            if not left:
                break
        return answer


def request_of(document: Document) -> str:
    """What a router may see of a document: its prompt, the turns before the first answer, or plain text itself."""
    if isinstance(document.content, Text):
        return document.content.prompt or document.content.completion
    turns = document.content.turns
    first = next(i for i, (role, _) in enumerate(turns) if role == "assistant")
    return "\n".join(text for _, text in turns[:first]) or turns[first][1]


def find_route(ref: str | Path, ctx: Context) -> Path | None:
    """The directory of a route that a model reference leads to; None where it is something else."""
    path = ctx.models.get(str(ref)) or ctx.base_dir / Path(ref).expanduser()
    return path if (path / _FILE).is_file() else None


def write_route(
    directory: Path, content: Mapping[str, Any], matrices: Mapping[str, Array], *, base_dir: Path, home: Path
) -> None:
    """Write a route into a staging directory; `base_dir` is where its references start from, `home` where it will be.

    The content is as in the module's docstring; `matrices` is empty for a cascade.
    """
    if matrices:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(m, np.float32) for name, m in matrices.items()}, directory / _MATRICES)
        mode = (directory.stat().st_mode & 0o666) | 0o600  # safetensors makes it readable for its owner alone
        (directory / _MATRICES).chmod(mode)
    text = json.dumps({"schema": 1, **content}, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / _FILE).write_text(text + "\n", encoding="utf-8")
    (directory / BASE_DIR_FILE).write_text(os.path.relpath(base_dir, home) + "\n", encoding="utf-8")


def open_route(directory: Path, ctx: Context, *, places: Mapping[str, str | Path] | None = None) -> Route:
    """Open a route: its record and the headers of its models are read and checked; contents are not compared.

    A reference is looked up in the route's directory, among `ctx.models`, beside the route, from the folder it was
    written for, and on the hub.

    Args:
        directory: of the route.
        ctx: stages, permissions.
        places: where specialists are now, by name.

    Raises:
        ConfigError: `places` names what is no specialist.
        CheckpointError: no route, a damaged one, or a model that is gone: all of them are named.
    """
    content = _read(directory)
    known = [record["name"] for record in content["specialists"]]
    for name in places or {}:
        if name not in known:
            raise ConfigError(f"{directory}: {name!r} is no specialist of this route{did_you_mean(name, known)}")
    marker = directory / BASE_DIR_FILE
    base_dir = (directory / marker.read_text(encoding="utf-8").strip()).resolve() if marker.is_file() else ctx.base_dir
    records = [*content["specialists"], *([content["base"]] if content["base"] else [])]
    parts = {part for record in records for part in record["ref"].split("+") if "/" not in part and part}
    beside = {part: directory.parent / part for part in parts if (directory.parent / part).is_dir()}
    inside = {part: directory / part for part in parts if (directory / part).is_dir()}  # adapters come with it
    here = replace(ctx, base_dir=base_dir, models={**beside, **ctx.models, **inside})
    problems: list[str] = []

    def opened(what: str, record: Mapping[str, Any]) -> Checkpoint | None:
        ref = (places or {}).get(record.get("name", "")) or _pinned(record, here)
        try:
            return open_checkpoint(ref, ctx if ref in (places or {}).values() else here)
        except CheckpointError as e:
            problems.append(f"{what}: {e}")
            return None

    found = {s["name"]: opened(f"specialist {s['name']!r}", s) for s in content["specialists"]}
    base = opened("the base", content["base"]) if content["base"] else None
    specialists = {name: model for name, model in found.items() if model is not None}
    if problems:
        raise CheckpointError(
            f"{directory}: {'; '.join(problems)}. Put it back where it was, or say where it is now "
            "(`places=` of RoutedModels.open), or fit the route again (solera route)"
        )
    return Route(directory, specialists, base, content)


def _pinned(record: Mapping[str, Any], ctx: Context) -> str:
    """The reference, of a model on the hub with the commit that the route was fitted to."""
    ref, revision = str(record["ref"]), record.get("revision")
    local = ref in ctx.models or (ctx.base_dir / Path(ref).expanduser()).is_dir()
    return f"{ref.split('@')[0]}@{revision}" if revision and is_hub_id(ref) and not local else ref


def _read(directory: Path) -> dict[str, Any]:
    file = directory / _FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{directory}: is no route: it has no {_FILE} (solera route makes one)") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from e
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise CheckpointError(f"{file}: not a route of schema 1; it was made by another version of solera")
    shapes: dict[str, type] = {"method": str, "specialists": list, "request_tokens": int}
    cascade = content.get("method") == "cascade"
    shapes |= {"order": list, "thresholds": list, "confidence": str} if cascade else {"choice": list, "base": dict}
    for key, expected in shapes.items():
        if not isinstance(content.get(key), expected):
            raise CheckpointError(f"{file}: `{key}` is missing or not of type {expected.__name__}")
    for record in [*content["specialists"], *([] if cascade else [content["base"]])]:
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("ref", "digest")):
            raise CheckpointError(f"{file}: a model has no `ref` or no `digest`: {record!r}")
    if not all(isinstance(record.get("name"), str) for record in content["specialists"]):
        raise CheckpointError(f"{file}: a specialist has no `name`")
    if not cascade and not (directory / _MATRICES).is_file():
        raise CheckpointError(f"{directory}: {_MATRICES} is missing; fit the route again")
    return content


def _read_matrices(directory: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = directory / _MATRICES
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e
    if absent := {"mean", "scale", "weight", "bias"} - found.keys():
        raise CheckpointError(f"{file}: holds no {', '.join(sorted(absent))}; fit the route again")
    return {name: value.astype(np.float64) for name, value in found.items()}


# what a router sees --------------------------------------------------------------------------------------------------


def mean_states(
    model: Any, tokenizer: Any, requests: Sequence[str], *, tokens: int, advance: Callable[[float], object] = id
) -> Array:
    """Mean over the first `tokens` tokens of the model's last hidden states, (N, D) float64.

    The state of a BOS is left out, unless there is nothing else.

    Raises:
        CheckpointError: a state is NaN or infinite.
    """
    import torch

    encoded = [_ids(model, tokenizer, request, tokens) for request in requests]
    found_ND: Array | None = None
    with torch.inference_mode():
        for batch in _batches(encoded):
            length = len(encoded[batch[0]])
            ids_BT = [encoded[i] + encoded[i][-1:] * (length - len(encoded[i])) for i in batch]  # causal: no mask
            states_BTD = model.base_model(input_ids=torch.tensor(ids_BT, device=model.device), use_cache=False)[0]
            for row, i in enumerate(batch):
                ids = encoded[i]
                first = 1 if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else 0
                mean_D = states_BTD[row, first : len(ids)].double().mean(dim=0).cpu().numpy()
                if found_ND is None:
                    found_ND = np.empty((len(encoded), len(mean_D)))
                found_ND[i] = mean_D
            advance(float(len(batch)))
    assert found_ND is not None
    if not np.isfinite(found_ND).all():
        raise CheckpointError(
            f"{getattr(model, 'name_or_path', 'the base')}: hidden states are NaN or infinite; its weights are "
            "damaged, or its activations overflow in this dtype (try float32)"
        )
    return found_ND


def directions(states_ND: Array, mean_D: Array, scale_D: Array) -> Array:
    """Unit vectors of the standardised states."""
    u_ND = (states_ND - mean_D) / scale_D
    x_ND: Array = u_ND / np.maximum(np.linalg.norm(u_ND, axis=1, keepdims=True), 1e-12)
    return x_ND


def confidences(model: Any, tokenizer: Any, requests: Sequence[str], *, tokens: int, kind: str) -> list[float]:
    """How sure a model is of every request, from its first `tokens` tokens; more is surer.

    `log_probability`: the mean log-probability of its tokens (nats). `entropy`: less the mean entropy of the
    next-token distributions (nats). -inf where there is no token to predict.

    Raises:
        CheckpointError: the model gives NaN.
    """
    import torch

    from solera_core.likelihood import Query, log_likelihoods, require_finite

    encoded = [_ids(model, tokenizer, request, tokens, prefixed=True) for request in requests]
    usable = [i for i, ids in enumerate(encoded) if len(ids) > 1]
    answer = [-math.inf] * len(encoded)
    if kind == "log_probability":
        queries = [
            Query(tuple(ids[:-1]), tuple(range(len(ids) - 1)), tuple(ids[1:]))
            for ids in map(encoded.__getitem__, usable)
        ]
        for i, value in zip(usable, log_likelihoods(model, queries, batch_tokens=_BATCH_TOKENS), strict=True):
            answer[i] = value / (len(encoded[i]) - 1)
    else:
        with torch.inference_mode():
            for i in usable:
                ids_BT = torch.tensor([encoded[i][:-1]], device=model.device)
                logprobs_TV = model(input_ids=ids_BT, use_cache=False).logits[0].float().log_softmax(-1)
                answer[i] = float((logprobs_TV.exp() * logprobs_TV.clamp_min(-1e4)).sum(-1).double().mean())
    for i in usable:
        require_finite(answer[i], f"request {requests[i][:40]!r}")
    return answer


def _ids(model: Any, tokenizer: Any, request: str, tokens: int, *, prefixed: bool = False) -> list[int]:
    from solera_core.likelihood import context_tokens
    from solera_core.prefix import prefix_id, prompt_ids

    limit = min(tokens, context_tokens(model) or tokens)
    start = prefix_id(tokenizer)
    ids = prompt_ids(tokenizer, request) if request else []
    if start is not None and (not ids or (prefixed and ids[0] != start)):
        ids = [start, *ids]
    if not ids:
        raise CheckpointError(f"request {request[:40]!r} has no token in the vocabulary of {tokenizer.name_or_path}")
    return ids[:limit]


def _batches(encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices by falling length, as many together as fit."""
    batches: list[list[int]] = []
    for i in sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i)):
        if batches and (len(batches[-1]) + 1) * len(encoded[batches[-1][0]]) <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
