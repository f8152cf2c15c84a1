"""A model seen as hidden states and an output matrix, and the student together with its loss as one module."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solera_core.errors import CheckpointError
from solera_distill.balance import balance_loss, router_outputs
from solera_distill.losses import fused_loss

__all__ = ["StudentWithObjective", "check_head", "experts_for", "hidden_states", "output_matrix"]


def hidden_states(model: Any, inputs_BT: Tensor) -> Tensor:
    """(B, T, D) last hidden states, after the final norm, of right-padded rows: causal, so no mask is needed."""
    return model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def output_matrix(model: Any) -> Tensor:
    """(V, D) the matrix that turns hidden states into logits."""
    return model.get_output_embeddings().weight  # type: ignore[no-any-return]


@torch.no_grad()
def check_head(model: Any, where: str) -> None:
    """Prove on a few tokens that the model's logits are hidden states times output matrix.

    Raises:
        CheckpointError: they are not (a bias, a scale, a cap on the logits), so that the loss would not be the model's
            own; or they are not finite.
    """
    inputs = torch.arange(8, device=output_matrix(model).device).unsqueeze(0) % output_matrix(model).shape[0]
    own = model(input_ids=inputs, use_cache=False).logits.float()
    ours = (hidden_states(model, inputs) @ output_matrix(model).t()).float()
    if not bool(torch.isfinite(own).all()):
        raise CheckpointError(
            f"{where}: its logits are not finite; the weights are damaged (`solera inspect` shows where)"
        )
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise CheckpointError(
            f"{where}: {type(model).__name__} does not compute its logits as hidden states times output matrix (a "
            "bias, a scale or a cap is in between), which the fused loss needs; such models cannot be trained yet"
        )


def experts_for(model: Any, device: torch.device) -> None:
    """Choose how a mixture of experts computes: on the CPU one expert after the other.

    Measured on two cores (hidden 128, feed-forward 384, 4 layers, 3 experts, 2 a token, 4096 tokens a step): `eager`
    13 400 tokens/s, `grouped_mm` (the default) 12 800 at best, `batched_mm` 455 (it copies an expert for every token).
    All are deterministic there.
    """
    if device.type == "cpu" and hasattr(model, "set_experts_implementation") and _has_experts(model):
        model.set_experts_implementation("eager")


def _has_experts(model: nn.Module) -> bool:
    return any(type(m).__name__.endswith("Experts") for m in model.modules())


class StudentWithObjective(nn.Module):
    """The student and its loss as one module, whose forward is the whole computation of a micro-batch.

    This is what accelerate wraps: DDP and FSDP synchronise gradients by hooks on the forward of the module that they
    were given, and a loss computed from the outside, on the unwrapped model, would silently train every rank by itself.
    """

    def __init__(
        self,
        model: Any,
        *,
        kl: float,
        ce: float,
        temperature: float,
        autocast: bool,
        balance: float = 0.0,
        routers: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.kl = kl
        self.ce = ce
        self.temperature = temperature
        self.autocast = autocast
        self.balance = balance
        self.routers = list(routers)  # a plain list: they are the model's own, not modules of this one

    def forward(
        self,
        inputs_BT: Tensor,
        positions_N: Tensor,
        targets_N: Tensor,
        scale: float,
        teacher_hidden_ND: Tensor | None = None,
        teacher_head_VD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, `scale` times the sum over its learned tokens; and the sums of KL and of CE."""
        with half(inputs_BT.device, self.autocast), router_outputs(self.routers) as routed:
            hidden_BTD = hidden_states(self.model, inputs_BT)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        if positions_N.shape[0] != hidden_ND.shape[0]:
            hidden_ND = hidden_ND.index_select(0, positions_N)
        loss, sums = fused_loss(
            hidden_ND,
            output_matrix(self.model),
            targets_N,
            teacher_hidden=teacher_hidden_ND,
            teacher_head=teacher_head_VD,
            kl=self.kl,
            ce=self.ce,
            temperature=self.temperature,
            scale=scale,
            matmul=torch.bfloat16 if self.autocast else None,
        )
        if self.balance:
            loss = loss + self.balance * scale * positions_N.numel() * balance_loss(routed, positions_N)
        return loss, sums


@contextlib.contextmanager
def half(device: torch.device, enabled: bool) -> Iterator[None]:
    """Matrix products in bfloat16 where `enabled`. Not accelerate's own: that one is fixed for the whole process."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        yield
