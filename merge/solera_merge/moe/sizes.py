"""Experts that share neurons, and experts made slimmer: which neurons, and what it costs on held-out text.

    E experts, L layers, D model width, F width of a feed-forward network, N tokens
    a_e (N, F) what the neurons of expert e put out on text of its own domain, d_ej (D,) column j of its down_proj

A neuron adds a_ej d_ej to the state of a token. Sharing neuron j puts the average neuron m in its place, so the score
of sharing it is the mean over tokens and experts of |a_ej d_ej - a_mj d_mj|^2. An expert's neuron is worth keeping by
the mean of |a_ej| |d_ej|.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.context import Context
from solera_core.dtypes import ITEM_BYTES
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.dense import FFN, Dense
from solera_merge.moe.fit import Calibration
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.layers import Chunk, chunks_of, dense_layers, run_layers
from solera_merge.moe.neurons import Group, Refitted, averaged, every_neuron, split
from solera_merge.moe.neurons import compose as composed
from solera_merge.moe.states import LayerInputs, Taught, put_ffn, taught_states
from solera_merge.moe.write import moe_specs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["resize"]

Neurons = list[npt.NDArray[np.intp]]

_TOKENS: Final = 512  # of which activations are in memory at a time


def resize(
    config: MoeConfig, inputs: Inputs, calibration: Calibration | None, scratch: Path, ctx: Context
) -> tuple[Inputs, dict[str, Any]]:
    """The experts as the recipe wants their sizes, and the facts for solera.json; untouched where it says nothing.

    In memory are the feed-forward networks of one layer of all experts, one layer of a dense model, and, to refit, an
    F x F matrix of float64.

    Args:
        config: the settings.
        inputs: with the trunk that they will have.
        calibration: text of every expert's domain; None: there is none.
        scratch: an empty directory, which must stay as long as the experts are used.
        ctx: threads, progress.
    """
    if config.shared is None and config.slim is None:
        return inputs, {}
    texts: list[Taught] = []
    if calibration is not None and calibration.fit:
        texts = [
            Taught(e, f"router.data.{inputs.names[e]}", text)
            for e, text in zip(calibration.experts, calibration.fit, strict=True)
        ]
    chosen = _choose(config, inputs, texts, scratch, ctx)
    stages: dict[str, list[Dense]] = {"unsplit": list(inputs.experts)}
    routed = [Group(e, chosen.routed or every_neuron(e), _routed_scale(config)) for e in inputs.experts]
    shared, copied = _shared(config, inputs, chosen)
    if config.slim is not None:
        kept = [
            replace(group, neurons=neurons, down=down)
            for group, neurons, down in zip(routed, chosen.kept, chosen.refitted, strict=True)
        ]
        if shared is not None:
            stages["shared"] = [split(group.model, group, shared) for group in routed]
        if config.slim.refit:
            stages["slim, not refitted"] = [_put(replace(group, down=None), shared) for group in kept]
        routed = kept
    stages["built"] = [_put(group, shared) for group in routed]
    found = replace(inputs, experts=tuple(stages["built"]), copied=copied)
    return found, _facts(config, inputs, found, stages, chosen, calibration, scratch, ctx)


def _put(routed: Group, shared: Group | None) -> Dense:
    own = routed.model
    return composed(own, [routed]) if shared is None else split(own, routed, shared)


def _routed_scale(config: MoeConfig) -> float:
    return config.shared.routed_scale if config.shared is not None and config.shared.model is not None else 1.0


def _shared(config: MoeConfig, inputs: Inputs, chosen: "_Chosen") -> tuple[Group | None, Dense | None]:
    """The neurons of the shared expert, and the trunk split as an expert is."""
    trunk = inputs.trunk
    if config.shared is None:
        return None, None
    if inputs.shared_model is not None:
        shared = Group(inputs.shared_model, every_neuron(inputs.shared_model), config.shared.residual_scale)
        return shared, split(trunk, Group(trunk, every_neuron(trunk), config.shared.routed_scale), shared)
    shared = Group(averaged(inputs.experts), chosen.shared)
    return shared, split(trunk, Group(trunk, chosen.routed), Group(trunk, chosen.shared))


@dataclass(frozen=True)
class _Chosen:
    """Neurons, by layer.

    Attributes:
        shared: by all experts.
        routed: the others. (Both empty where no neurons are shared.)
        kept: of every expert, what slimming leaves.
        refitted: of every expert, their output matrices (None: as they were).
        given_up: share of all differences between the experts that lies in the shared neurons, by layer.
        left_out: of every expert, share of its contribution that lies in what slimming drops, mean over the layers.
    """

    shared: Neurons
    routed: Neurons
    kept: list[Neurons]
    refitted: list[Refitted | None]
    given_up: list[float]
    left_out: list[float]


def _choose(config: MoeConfig, inputs: Inputs, texts: Sequence[Taught], scratch: Path, ctx: Context) -> _Chosen:
    by_neuron = config.shared is not None and config.shared.neurons is not None
    by_text = by_neuron and config.shared is not None and config.shared.score == "activation"
    slim, experts = config.slim, inputs.experts
    sizes = [min(inputs.width, expert.width) for expert in experts]
    found = _Chosen([], [], [[] for _ in experts], [None] * len(experts), [], [0.0] * len(experts))
    if not by_neuron and slim is None:
        return found
    layers: Iterable[LayerInputs | None] = [None] * inputs.trunk.layers
    if by_text or slim is not None:
        layers = taught_states(
            inputs.trunk, experts, texts, scratch=scratch, keep=True, threads=ctx.threads, progress=ctx.progress
        )
    for layer, text in enumerate(layers):
        networks = _Networks.read(experts, layer)
        measured = networks.measure(text) if text is not None else None
        score_F = measured.differences if by_text and measured is not None else networks.distances()
        shared = np.sort(np.argsort(score_F, kind="stable")[: inputs.shared if by_neuron else 0])
        routed = np.setdiff1d(np.arange(networks.width), shared)
        if by_neuron:
            found.shared.append(shared)
            found.routed.append(routed)
            found.given_up.append(float(score_F[shared].sum() / max(score_F.sum(), 1e-30)))
        if slim is None or text is None or measured is None:
            continue
        for e, worth_F in enumerate(measured.contributions):
            own = routed[routed < experts[e].width]
            kept = np.sort(own[np.argsort(-worth_F[own], kind="stable")[: sizes[e]]])
            found.kept[e].append(kept)
            dropped = 1 - worth_F[kept].sum() / max(worth_F[own].sum(), 1e-30)
            found.left_out[e] += float(dropped) / inputs.trunk.layers
            if slim.refit:
                down_DK = networks.refit(e, text, kept, shared, ridge=slim.ridge)
                with (scratch / f"down-{e}").open("ab") as file:
                    file.write(down_DK.tobytes())
    if slim is not None and slim.refit:
        found = replace(found, refitted=[Refitted(scratch / f"down-{e}", size) for e, size in enumerate(sizes)])
    return found


@dataclass(frozen=True)
class _Measured:
    """What neurons do on text: `differences` (F,) of sharing them, `contributions` (F,) of every expert's."""

    differences: np.ndarray
    contributions: list[np.ndarray]


class _Networks:
    """The feed-forward networks of one layer of all experts: gate, up (F, D) and down (D, F), float32."""

    def __init__(self, weights: Sequence[tuple["torch.Tensor", ...]], activation: str) -> None:
        from transformers.activations import ACT2FN

        self._act = ACT2FN[activation]
        self._experts = weights
        self._same = len({gate.shape for gate, _, _ in weights}) == 1
        if self._same:
            import torch

            self._mean = tuple(
                (sum(w[i].double() for w in weights) / len(weights)).to(torch.float32)  # type: ignore[union-attr]
                for i in range(3)
            )

    @classmethod
    def read(cls, experts: Sequence[Dense], layer: int) -> "_Networks":
        import torch

        names = [f"model.layers.{layer}.{name}" for name in FFN]
        weights = [tuple(torch.from_numpy(e.checkpoint.read(name)) for name in names) for e in experts]
        return cls(weights, experts[0].fields["hidden_act"])

    @property
    def width(self) -> int:
        """Of the widest."""
        return max(int(gate.shape[0]) for gate, _, _ in self._experts)

    def distances(self) -> np.ndarray:
        """(F,) how far the experts' neurons are from their average, as a share of each matrix's squares, added up."""
        if not self._same:
            return np.zeros(self.width)
        total = np.zeros(self.width)
        for i, mean in enumerate(self._mean):
            rows = 0 if i == 2 else 1
            scale = max(float(mean.double().square().sum()), 1e-30)
            for weights in self._experts:
                total += (weights[i].double() - mean.double()).square().sum(dim=rows).numpy() / scale
        return total

    def measure(self, inputs: LayerInputs) -> _Measured:
        """Run the text of every domain through its expert's neurons, and through the average ones."""
        differences = np.zeros(self.width)
        contributions = [np.zeros(self.width) for _ in self._experts]
        for e, x_ND, share in self._blocks(inputs):
            own = self._experts[e]
            a_NF, d_F = self._out(own, x_ND), own[2].double().square().sum(dim=0)
            here = slice(0, len(d_F))
            contributions[e][here] += (a_NF.abs().double().sum(dim=0) * d_F.sqrt()).numpy() * share
            if self._same:
                m_NF, mean = self._out(self._mean, x_ND), self._mean[2].double()
                differences += (
                    share
                    * (
                        a_NF.double().square().sum(dim=0) * d_F
                        - 2 * (a_NF.double() * m_NF.double()).sum(dim=0) * (own[2].double() * mean).sum(dim=0)
                        + m_NF.double().square().sum(dim=0) * mean.square().sum(dim=0)
                    ).numpy()
                )
        return _Measured(np.maximum(differences, 0), contributions)

    def refit(
        self,
        e: int,
        inputs: LayerInputs,
        kept: npt.NDArray[np.intp],
        shared: npt.NDArray[np.intp],
        *,
        ridge: float,
    ) -> np.ndarray:
        """(D, kept) the output matrix with which `kept` and the shared neurons come nearest to what expert e put out.

        Least squares for the change from the matrix as it was: min |A dB' - T|^2 + ridge * mean(A^2) N |dB|^2, where T
        (N, D) is what is missing with the matrix as it was.
        """
        import torch

        gate, up, down = self._experts[e]
        kept_, shared_ = torch.from_numpy(kept), torch.from_numpy(shared)
        gram = torch.zeros(len(kept), len(kept), dtype=torch.float64)
        cross = torch.zeros(len(kept), down.shape[0], dtype=torch.float64)
        for of, x_ND, _ in self._blocks(inputs):
            if of != e:
                continue
            a_NF = self._out((gate, up, down), x_ND).double()
            a_NK = a_NF[:, kept_]
            missing_ND = a_NF @ down.double().T - a_NK @ down.double()[:, kept_].T
            if len(shared):
                m_NS = self._out(tuple(w[shared_] for w in self._mean[:2]), x_ND).double()
                missing_ND -= m_NS @ self._mean[2].double()[:, shared_].T
            gram += a_NK.T @ a_NK
            cross += a_NK.T @ missing_ND
        penalty = ridge * max(float(gram.trace()) / len(kept), 1e-30)
        change_KD = torch.linalg.solve(gram + penalty * torch.eye(len(kept), dtype=torch.float64), cross)
        return np.ascontiguousarray((down.double()[:, kept_] + change_KD.T).float().numpy())

    def _out(self, weights: Sequence["torch.Tensor"], x_ND: "torch.Tensor") -> "torch.Tensor":
        out_NF: torch.Tensor = self._act(x_ND @ weights[0].T) * (x_ND @ weights[1].T)
        return out_NF

    def _blocks(self, inputs: LayerInputs) -> Iterator[tuple[int, "torch.Tensor", float]]:
        """Expert, states (n, D), and 1 / tokens of its text, so that every domain counts the same."""
        import torch

        tokens = {taught.expert: taught.text.tokens for taught in inputs.texts}
        for states, labels in inputs.blocks():
            e = int(labels[0].argmax())
            for start in range(0, len(states), _TOKENS):
                yield e, torch.from_numpy(states[start : start + _TOKENS]), 1 / tokens[e]


def _facts(
    config: MoeConfig,
    inputs: Inputs,
    built: Inputs,
    stages: dict[str, list[Dense]],
    chosen: _Chosen,
    calibration: Calibration | None,
    scratch: Path,
    ctx: Context,
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if config.shared is not None:
        facts["shared_width"] = inputs.shared
        if chosen.given_up:
            facts["differences_given_up"] = [rounded(share) for share in chosen.given_up]
    facts["expert_width"] = built.width
    if config.slim is not None:
        facts["contribution_dropped"] = dict(zip(inputs.names, map(rounded, chosen.left_out), strict=True))
    rows: list[dict[str, Any]] = []
    for setting, experts in stages.items():
        row = {"setting": setting, **_parameters(config, inputs, experts)}
        if calibration is not None and calibration.held_out:
            losses = _oracle_nll(inputs, experts, calibration, scratch, ctx, title=f"sizes: {setting}")
            names = [inputs.names[e] for e in calibration.experts]
            row["oracle_routed_nll"] = {
                "mean": rounded(float(np.mean(losses))),
                "domains": {name: rounded(loss) for name, loss in zip(names, losses, strict=True)},
            }
            ctx.progress.note(
                f"{setting}: {row['parameters_total']:,} parameters, {np.mean(losses):.4f} nats a token with every "
                "text sent to its expert"
            )
        rows.append(row)
    return {"sizes": facts | {"rows": rows}}


def _parameters(config: MoeConfig, inputs: Inputs, experts: Sequence[Dense]) -> dict[str, int]:
    """Parameters and bytes of the MoE with these experts; not of what the format has and nobody fills (zeros)."""
    target, trunk, count = inputs.target, inputs.trunk, len(experts)
    shared = experts[0].split[1].width if experts[0].split else 0
    sizes: dict[str, Any] = {"experts": count, "width": max(e.routed.width for e in experts), "shared": shared}
    dtypes = {spec.name: spec.dtype for spec in moe_specs(target, trunk, dtype=config.dtype, **sizes)}
    pieces = [piece for piece in target.pieces(trunk.fields, **sizes) if not piece.zero]
    total = sum(math.prod(piece.block) for piece in pieces)
    routed = sum(math.prod(piece.block) for piece in pieces if piece.expert is not None)
    return {
        "parameters_total": total,
        "parameters_active": total - routed + routed // count * config.top_k,
        "bytes": sum(math.prod(piece.block) * ITEM_BYTES[dtypes[piece.name]] for piece in pieces),
    }


def _oracle_nll(
    inputs: Inputs, experts: Sequence[Dense], calibration: Calibration, scratch: Path, ctx: Context, *, title: str
) -> list[float]:
    """Nats a token of every domain's held-out text, through the trunk with its expert's networks; layer by layer."""
    import torch

    texts: Sequence[Sequences] = calibration.held_out
    totals, scored = np.zeros(len(texts)), np.zeros(len(texts))
    last: list[Any] = [None, -1]

    @contextmanager
    def under(model: "PreTrainedModel", layer: int, text: int) -> Iterator[None]:
        if last[0] is not model or last[1] != text:
            put_ffn(model, experts[calibration.experts[text]], layer=layer)
            last[:] = model, text
        yield

    def score(way: int, chunk: Chunk, logits_BTV: "torch.Tensor") -> None:
        del way
        nll_BT = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().transpose(1, 2), chunk.ids[:, 1:], reduction="none"
        )
        scored_BT = chunk.targets[:, 1:]
        totals[chunk.text] += float(nll_BT.double()[scored_BT].sum())
        scored[chunk.text] += int(scored_BT.sum())

    layers = dense_layers(inputs.trunk, inputs.trunk, scratch / "layer", threads=ctx.threads)
    with ctx.progress.task(title, len(layers), "layers") as task:
        run_layers(layers, chunks_of(texts), [under], score, scratch=scratch, task=task)
    return [float(loss) for loss in totals / scored]
