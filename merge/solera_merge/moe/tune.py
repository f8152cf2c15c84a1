"""Choosing among routers, and their temperature, by the written MoE itself on held-out text, layer by layer.

E experts, L layers, D model width
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.dtypes import from_float32, to_float32
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.config import FITS, MoeConfig
from solera_merge.moe.fit import Calibration
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.layers import Chunk, Layers, Way, chunks_of, moe_layers, run_layers
from solera_merge.moe.router import SCALES, search_scale
from solera_merge.moe.routing import first_choices, forced_route, set_routers
from solera_merge.moe.write import replace_routers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["TRIALS", "Judge", "Measured", "Tuned", "tune_routers"]

TRIALS = len(SCALES)
"""Scales that are tried at once: each has its own states on disk."""


@dataclass(frozen=True)
class Measured:
    """What one way of routing gives on the held-out text.

    Attributes:
        nll: nats a token, by domain.
        shares: (domains, L, E), share of each domain's tokens that a layer sends to each expert first.
    """

    nll: tuple[float, ...]
    shares: np.ndarray

    @property
    def mean(self) -> float:
        """Over the domains."""
        return float(np.mean(self.nll))


class Judge:
    """Runs held-out text through a MoE that lies on disk: one layer of it in memory, states in files."""

    def __init__(
        self, layers: Layers, texts: Sequence[Sequences], *, experts: int, scratch: Path, ctx: Context
    ) -> None:
        self._layers = layers
        self._texts = texts
        self._chunks = chunks_of(texts)
        self._experts = experts
        self._scratch = scratch
        self._ctx = ctx

    def __len__(self) -> int:
        return len(self._texts)

    def routed(self, routers: Sequence[Sequence[np.ndarray]], title: str) -> list[Measured]:
        """Under each of several sets of routers, one (E, D) matrix a layer."""
        return self._run(list(routers), title)

    def forced(self, experts: Sequence[int], title: str) -> Measured:
        """With every token of domain d sent to `experts[d]`."""
        return self._run([list(experts)], title)[0]

    def _run(self, ways: Sequence[Sequence[Any]], title: str) -> list[Measured]:
        import torch

        domains = len(self._texts)
        counts = np.zeros((len(ways), domains, len(self._layers), self._experts), dtype=np.int64)
        totals, scored = np.zeros((len(ways), domains)), np.zeros((len(ways), domains), dtype=np.int64)

        def way_of(number: int, settings: Sequence[Any]) -> Way:
            def way(model: "PreTrainedModel", layer: int, domain: int) -> AbstractContextManager[Any]:
                if isinstance(settings[0], int):
                    return forced_route(model, settings[domain])
                return _counted(model, settings[layer], counts[number, domain, layer])

            return way

        def score(way: int, chunk: Chunk, logits_BTV: "torch.Tensor") -> None:
            nll_BT = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].float().transpose(1, 2), chunk.ids[:, 1:], reduction="none"
            )
            scored_BT = chunk.targets[:, 1:]
            totals[way, chunk.text] += float(nll_BT.double()[scored_BT].sum())
            scored[way, chunk.text] += int(scored_BT.sum())

        with self._ctx.progress.task(title, len(self._layers), "layers") as task:
            run_layers(
                self._layers,
                self._chunks,
                [way_of(number, settings) for number, settings in enumerate(ways)],
                score,
                scratch=self._scratch,
                task=task,
            )
        shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
        return [
            Measured(tuple(float(x) for x in row), share) for row, share in zip(totals / scored, shares, strict=True)
        ]


@contextmanager
def _counted(model: "PreTrainedModel", router_ED: np.ndarray, counts_E: np.ndarray) -> Iterator[None]:
    set_routers(model, [router_ED])
    with first_choices(model, len(counts_E)) as counts_1E:
        yield
    counts_E += counts_1E[0]


@dataclass(frozen=True)
class Tuned:
    """One candidate at its best temperature.

    Attributes:
        fit: how it was made.
        scale: 1 / temperature.
        measured: at this scale.
        tried: every scale, with its loss.
    """

    fit: str
    scale: float
    measured: Measured
    tried: Mapping[float, float]


def tune_routers(
    directory: Path,
    candidates: Mapping[str, Sequence[np.ndarray]],
    config: MoeConfig,
    inputs: Inputs,
    calibration: Calibration,
    scratch: Path,
    ctx: Context,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Find the temperature of every candidate, put the best one into a written MoE, and measure it on held-out text.

    Every scale is judged by the MoE itself: the mean over domains of the negative log-likelihood. With one expert a
    token the scale has no effect (its weight is always 1) and none is searched. Where the text has no domains it
    counts as one.

    Args:
        directory: of the MoE.
        candidates: routers by the name of their fit, one (E, D) matrix a layer, at temperature 1.
        config: of the MoE.
        inputs: opened.
        calibration: held-out text.
        scratch: a directory for states.
        ctx: progress.

    Returns:
        The new digests of the routers, and the facts for solera.json.
    """
    if calibration.held_out:
        names, texts = [inputs.names[e] for e in calibration.experts], calibration.held_out
    else:
        assert calibration.unlabelled is not None
        names, texts = ["unlabelled"], (calibration.unlabelled[1],)
    layers = moe_layers(open_checkpoint(directory, Context()), scratch / "layer")
    judge = Judge(layers, texts, experts=len(inputs.names), scratch=scratch, ctx=ctx)
    results: list[Tuned] = []
    for fit, rows in candidates.items():
        results.append(_tune(judge, fit, rows, config, inputs))
        if len(candidates) > 1:
            found = results[-1]
            ctx.progress.note(
                f"router {fit}: {found.measured.mean:.4f} nats a token on held-out text at temperature "
                f"{1 / found.scale:.3g}"
            )
    best = min(results, key=lambda result: result.measured.mean)  # the first, the simpler, of equals
    if len(candidates) > 1:
        ctx.progress.note(f"router: {best.fit} is the best of {len(results)} and is taken")
    built = open_checkpoint(directory, Context())
    # Measured as they will be on disk, rounded to their number format; written last, because files that change under an
    # open checkpoint are refused.
    rounded_rows: list[np.ndarray] = []
    for layer, router_ED in enumerate(candidates[best.fit]):
        stored = built.tensors[inputs.target.router.format(layer=layer)].dtype
        raw = from_float32((best.scale * router_ED).astype(np.float32), stored)
        rounded_rows.append(to_float32(raw, stored).reshape(router_ED.shape))
    (tuned,) = judge.routed([rounded_rows], "measuring the routers")
    oracle = judge.forced(calibration.experts, "measuring the oracle's routes") if calibration.held_out else None
    digests = replace_routers(built, rounded_rows)
    facts: dict[str, Any] = {
        "fit": best.fit,
        "temperature": rounded(1 / best.scale),
        "tried": {f"{1 / s:.4g}": rounded(value) for s, value in sorted(best.tried.items(), reverse=True)},
        "tokens_held_out": {name: text.scored for name, text in zip(names, texts, strict=True)},
        "held_out_nll": {
            **({"at_temperature_1": rounded(best.tried[1.0])} if 1.0 in best.tried else {}),
            "mean": rounded(tuned.mean),
            "domains": {name: rounded(value) for name, value in zip(names, tuned.nll, strict=True)},
        },
    }
    if len(candidates) > 1:
        facts["candidates"] = [_row(result, calibration) for result in results]
    if oracle is None:
        facts["first_choices"] = [[rounded(x) for x in shares_E] for shares_E in tuned.shares[0]]
        return digests, facts
    facts["route_accuracy"] = {
        name: [rounded(value) for value in tuned.shares[d, :, e]]
        for d, (name, e) in enumerate(zip(names, calibration.experts, strict=True))
    }
    facts["held_out_nll"]["oracle_routed"] = {
        name: rounded(value) for name, value in zip(names, oracle.nll, strict=True)
    }
    return digests, facts


def _tune(judge: Judge, fit: str, rows: Sequence[np.ndarray], config: MoeConfig, inputs: Inputs) -> Tuned:
    asked = config.router.temperature
    found: dict[float, Measured] = {}

    def losses(scales: Sequence[float]) -> list[float]:
        title = f"router {fit}: temperatures {', '.join(f'{1 / scale:.3g}' for scale in scales)}"
        measured = judge.routed([[scale * router for router in rows] for scale in scales], title)
        found.update(zip(scales, measured, strict=True))
        return [result.mean for result in measured]

    tuned = FITS[config.router.fit].tuned
    if asked != "auto":
        scales = [1.0, 1 / asked] if tuned else [1 / asked]
    elif not tuned or config.top_k == 1:
        scales = [1.0]
    elif inputs.old is not None and len(judge) < len(inputs.names):
        scales = [1.0, 1 / inputs.old.temperature]
    else:
        scale, tried = search_scale(losses)
        return Tuned(fit, scale, found[scale], tried)
    scales = list(dict.fromkeys(scales))
    tried = dict(zip(scales, losses(scales), strict=True))
    return Tuned(fit, scales[-1], found[scales[-1]], tried)


def _row(result: Tuned, calibration: Calibration) -> dict[str, Any]:
    shares = result.measured.shares
    right = [float(shares[d, :, e].mean()) for d, e in enumerate(calibration.experts)]
    return {
        "fit": result.fit,
        "temperature": rounded(1 / result.scale),
        "held_out_nll": rounded(result.measured.mean),
        "route_accuracy": rounded(float(np.mean(right))),
    }
