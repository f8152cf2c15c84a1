"""Watching, forcing and scaling the routers of a loaded MoE."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_merge.moe.calibration import Sequences
from solera_merge.moe.states import batches
from solera_merge.moe.targets.choice import target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["choices", "first_choices", "forced_route", "mean_nll", "set_routers"]


@contextmanager
def forced_route(model: "PreTrainedModel", expert: int) -> Iterator[None]:
    """Inside, every token of every layer goes to one expert with weight 1, whatever the routers say."""
    import torch

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        del module, inputs
        logits_NE, weights_Nk, indices_Nk = output
        return logits_NE, torch.ones_like(weights_Nk[:, :1]), torch.full_like(indices_Nk[:, :1], expert)

    with _hooked(model, lambda _: hook):
        yield


@contextmanager
def first_choices(model: "PreTrainedModel", experts: int) -> Iterator[np.ndarray]:
    """Inside, counts into an (L, E) array how many tokens each layer sends to each expert first."""
    import torch

    counts_LE = np.zeros((model.config.num_hidden_layers, experts), dtype=np.int64)

    def count(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            del module, inputs
            counts_LE[layer] += torch.bincount(output[2][:, 0], minlength=experts).numpy()

        return hook

    with _hooked(model, count):
        yield counts_LE


@contextmanager
def choices(model: "PreTrainedModel") -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Inside, keeps the logits (N, E) of every call of a router and the experts that are chosen (N, k), best first."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        # What a router returns as logits are, in some classes, probabilities: so they are computed anew.
        rows_ND = inputs[0].reshape(-1, module.weight.shape[1])
        seen.append(((rows_ND @ module.weight.T).float().numpy(), output[2].numpy()))

    with _hooked(model, lambda _: hook):
        yield seen


def set_routers(model: "PreTrainedModel", routers: Sequence[np.ndarray]) -> None:
    """Put (E, D) matrices in place of the model's routers."""
    import torch

    with torch.no_grad():
        for layer, router in enumerate(routers):
            _router(model, layer).weight.copy_(torch.from_numpy(np.asarray(router, dtype=np.float32)))


def mean_nll(model: "PreTrainedModel", sequences: Sequences) -> float:
    """Mean negative log-likelihood, in nats a token, of the scored tokens of one domain (the first of a sequence has
    no context and is not scored). Sums in float64.
    """
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for ids_BT, targets_BT in batches(sequences):
            if ids_BT.shape[1] < 2:
                continue
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
            nll_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
            scored_BT = targets_BT[:, 1:]
            total += float(nll_BT.double()[scored_BT].sum())
            count += int(scored_BT.sum())
    return total / count


def _router(model: "PreTrainedModel", layer: int) -> Any:
    return target_of(model.config.model_type).router_module(model, layer)


@contextmanager
def _hooked(model: "PreTrainedModel", hook_of: Callable[[int], Any]) -> Iterator[None]:
    handles = [
        _router(model, layer).register_forward_hook(hook_of(layer)) for layer in range(model.config.num_hidden_layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
