"""The load-balancing loss of a mixture of experts, gathered from its routers while the model runs.

Switch Transformers, arXiv 2101.03961, equations 4 to 6: E * sum_e f_e P_e, with f_e the share of the choices that
expert e got and P_e its mean probability; here with k choices a token. It is 1 where the load is even, and at most E.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from solera_core.errors import ConfigError, SoleraError
from solera_merge.moe.targets.choice import target_of

__all__ = ["balance_loss", "router_modules", "router_outputs"]


def router_modules(model: Any, where: str) -> list[Any]:
    """The router of every layer.

    Raises:
        ConfigError: the model has none that is known here.
    """
    kind = str(getattr(model.config, "model_type", None))
    try:
        target = target_of(kind)
        return [target.router_module(model, layer) for layer in range(model.config.num_hidden_layers)]
    except (SoleraError, AttributeError, KeyError) as e:
        raise ConfigError(f"balance: {where} is a {kind}, no mixture of experts whose routers are known here") from e


@contextmanager
def router_outputs(routers: Sequence[Any]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, collects (logits (N, E), chosen experts (N, k)) of every router that runs, with gradients."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        del module, inputs
        found.append((output[0], output[2]))

    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(outputs: Sequence[tuple[Tensor, Tensor]], positions_N: Tensor) -> Tensor:
    """The mean over layers of E * sum_e f_e P_e.

    Args:
        outputs: of every layer: logits (B T, E) and chosen experts (B T, k).
        positions_N: which tokens count: those that are learned, neither padding nor a prompt's.
    """
    losses: list[Tensor] = []
    for logits_TE, chosen_Tk in outputs:
        experts = logits_TE.shape[-1]
        p_E = torch.softmax(logits_TE.reshape(-1, experts)[positions_N].float(), dim=-1).mean(dim=0)
        chosen = chosen_Tk.reshape(-1, chosen_Tk.shape[-1])[positions_N].reshape(-1)
        f_E = torch.zeros_like(p_E).index_add_(0, chosen, torch.ones_like(chosen, dtype=p_E.dtype)) / chosen.numel()
        losses.append(experts * (f_E * p_E).sum())
    return torch.stack(losses).mean()
