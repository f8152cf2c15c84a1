"""What a layer's experts do on text: how often they are chosen, how much they add, and what they would answer.

N tokens, E experts, k experts a token, D model width, F width of an expert
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["SAMPLE_TOKENS", "LayerUsage", "expert_output", "hidden_neurons", "watch_usage"]

Array: TypeAlias = np.ndarray
SAMPLE_TOKENS: Final = 2048
"""Tokens a layer for which every expert is run, chosen by its router or not; the first of every batch."""


@dataclass
class LayerUsage:
    """Sums over the calibration text; all are plain sums, so the order of the text changes nothing but rounding.

    Attributes:
        counts: (E,), tokens routed to each expert.
        contribution: (E,), sum, over the tokens routed to it, of its weight times the L2 norm of its output. The weight
            is the one that the model uses: of the top k, renormalised where the model renormalises.
        tokens: all tokens.
        logits: (E, E), sum of the products of the router's logits, each token's less their mean (only
            differences count).
        outputs: (E, D), sum of the outputs of every expert over a sample of tokens, chosen or not; and
        sampled: how many those are.
        sample: the router's inputs of the sample.
    """

    counts: Array
    contribution: Array
    logits: Array
    outputs: Array
    tokens: int = 0
    sampled: int = 0
    sample: "list[torch.Tensor]" = field(default_factory=list["torch.Tensor"])


def watch_usage(
    finish: Callable[[int, LayerUsage, Any], None], *, batches: int, outputs: bool
) -> Callable[[int, Any], AbstractContextManager[None]]:
    """A watch for `layer_by_layer` that gathers the usage of every sparse layer.

    Args:
        finish: called behind the text with the layer's number, its usage and the loaded module of its experts
            (`gate_up_proj` (E, 2F, D), `down_proj` (E, D, F), `act_fn`).
        batches: that will come, so that the sample is spread over all of them.
        outputs: run every expert on a sample, too.
    """

    @contextmanager
    def watch(layer: int, model: Any) -> Iterator[None]:
        base: Any = model.base_model
        block = getattr(base.layers[0], "mlp", None) or base.layers[0].block_sparse_moe
        experts = getattr(block, "experts", None)
        if experts is None:  # a dense layer
            yield
            return
        router = getattr(block, "gate", None) or block.router
        count, _, width = experts.gate_up_proj.shape
        usage = LayerUsage(
            np.zeros(count, np.int64), np.zeros(count), np.zeros((count, count)), np.zeros((count, width))
        )
        share = -(-SAMPLE_TOKENS // batches) if outputs else 0

        def chosen(module: Any, inputs: Any) -> None:
            _add_routed(usage, module, *inputs)
            _add_sample(usage, module, inputs[0][:share])

        def decided(module: Any, inputs: Any, output: Any) -> None:
            del module, inputs
            logits_NE = output[0].double()
            logits_NE = logits_NE - logits_NE.mean(dim=1, keepdim=True)
            usage.logits += (logits_NE.T @ logits_NE).numpy()

        handles = [experts.register_forward_pre_hook(chosen), router.register_forward_hook(decided)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        finish(layer, usage, experts)

    return watch


def _add_routed(usage: LayerUsage, experts: Any, x_ND: Any, indices_Nk: Any, weights_Nk: Any) -> None:
    usage.tokens += len(x_ND)
    for e in indices_Nk.unique().tolist():
        token_M, place_M = (indices_Nk == e).nonzero(as_tuple=True)
        norm_M = expert_output(experts, e, x_ND[token_M]).norm(dim=1).double()
        usage.counts[e] += len(token_M)
        usage.contribution[e] += float((weights_Nk[token_M, place_M].double() * norm_M).sum())


def _add_sample(usage: LayerUsage, experts: Any, x_ND: Any) -> None:
    if not len(x_ND):
        return
    usage.sampled += len(x_ND)
    usage.sample.append(x_ND.clone())
    for e in range(len(usage.counts)):
        usage.outputs[e] += expert_output(experts, e, x_ND).double().sum(dim=0).numpy()


def hidden_neurons(experts: Any, e: int, x_ND: Any) -> Any:
    """The inner neurons of one expert, (N, F): act(gate x) * up x."""
    import torch

    gate_NF, up_NF = torch.nn.functional.linear(x_ND, experts.gate_up_proj[e]).chunk(2, dim=-1)
    return experts.act_fn(gate_NF) * up_NF


def expert_output(experts: Any, e: int, x_ND: Any) -> Any:
    """The output of one expert, (N, D)."""
    import torch

    return torch.nn.functional.linear(hidden_neurons(experts, e, x_ND), experts.down_proj[e])
