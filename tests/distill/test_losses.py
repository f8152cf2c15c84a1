"""The fused loss: identities, parity with the textbook, gradients, and what it never allocates."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from solera_distill import losses
from solera_distill.losses import fused_loss, negative_log_likelihood

N, D, E, V = 11, 6, 5, 13


def make(rows: int = V, teacher_rows: int = V, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(N, D).requires_grad_(),
        "head": draw(rows, D).requires_grad_(),
        "targets": torch.randint(0, min(rows, teacher_rows), (N,), generator=generator),
        "teacher_hidden": draw(N, E),
        "teacher_head": draw(teacher_rows, E),
    }


def backward(loss: Any) -> None:
    loss.backward()  # untyped in torch


def naive(t: dict[str, Any], kl: float, ce: float, temperature: float, scale: float) -> Tensor:
    """The textbook: both logits in full, autograd does the rest."""
    logits = t["hidden"] @ t["head"].t()
    common = min(t["head"].shape[0], t["teacher_head"].shape[0])
    teacher = (t["teacher_hidden"] @ t["teacher_head"].t())[:, :common]
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (logits / temperature).log_softmax(-1)[:, :common]
    divergence = (log_p.exp() * (log_p - log_q)).sum() * temperature**2
    loss: Tensor = scale * (kl * divergence + ce * functional.cross_entropy(logits, t["targets"], reduction="sum"))
    return loss


CASES = [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.3, 1.0), (0.7, 0.3, 2.5)]


@pytest.mark.parametrize("rows, teacher_rows", [(V, V), (V + 3, V), (V, V + 3)])
@pytest.mark.parametrize("kl, ce, temperature", CASES)
def test_equals_the_textbook_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, kl: float, ce: float, temperature: float, rows: int, teacher_rows: int
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda _: 4)  # 11 tokens: chunks of 4, 4 and 3
    ours, theirs = make(rows, teacher_rows), make(rows, teacher_rows)
    loss, sums = fused_loss(**ours, kl=kl, ce=ce, temperature=temperature, scale=0.25)
    expected = naive(theirs, kl, ce, temperature, 0.25)
    backward(3.0 * loss)  # an upstream factor must reach the gradients
    backward(3.0 * expected)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name in ("hidden", "head"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(0.25 * (kl * sums[0] + ce * sums[1]), expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kl, ce, temperature", CASES)
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, kl: float, ce: float, temperature: float) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda _: 5)
    t = make(teacher_rows=V - 2)

    def function(hidden: Tensor, head: Tensor) -> Tensor:
        return fused_loss(**{**t, "hidden": hidden, "head": head}, kl=kl, ce=ce, temperature=temperature, scale=0.5)[0]

    assert torch.autograd.gradcheck(function, (t["hidden"], t["head"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(dtype: torch.dtype) -> None:
    t = make(dtype=dtype)
    own = {"teacher_hidden": t["hidden"].detach(), "teacher_head": t["head"].detach()}
    loss, _ = fused_loss(**{**t, **own}, kl=1.0, ce=0.0, temperature=2.0)
    backward(loss)
    assert loss.item() == 0.0
    for name in ("hidden", "head"):
        gradient = t[name].grad
        assert gradient is not None
        assert gradient.abs().max().item() == 0.0


def test_by_hand() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = torch.tensor([[math.log(3.0)], [0.0]])  # q = 3/4, 1/4
    teacher = torch.tensor([[0.0], [0.0]])  # p = 1/2, 1/2
    loss, _ = fused_loss(
        hidden, head, torch.tensor([1]), teacher_hidden=torch.ones(1, 1), teacher_head=teacher, kl=1.0, ce=1.0
    )
    backward(loss)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss.item() == pytest.approx(kl - math.log(0.25), rel=1e-6)
    dlogit = (0.75 - 0.5) + (0.75 - 0.0)  # of the first logit; the second row's hidden gradient is 0
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(dlogit * math.log(3.0), rel=1e-6)


def test_rows_only_the_student_has_are_pushed_down() -> None:
    t = make(rows=V + 2)
    loss, _ = fused_loss(**t, kl=1.0, ce=0.0)
    backward(loss)
    q = (t["hidden"] @ t["head"].t()).softmax(-1).detach()
    expected = q[:, V:].t() @ t["hidden"].detach()  # gradient q - 0, never 0 itself
    assert t["head"].grad is not None
    torch.testing.assert_close(t["head"].grad[V:], expected)


def test_bfloat16_products_stay_near_the_exact_gradient() -> None:
    exact, rough = make(), make(dtype=torch.float32)
    backward(fused_loss(**exact, kl=1.0, ce=0.0)[0])
    loss, _ = fused_loss(**rough, kl=1.0, ce=0.0, matmul=torch.bfloat16)
    backward(loss)
    assert loss.dtype == torch.float32
    for name in ("hidden", "head"):
        a, b = exact[name].grad, rough[name].grad
        assert a is not None
        assert b is not None
        assert b.dtype == torch.float32
        assert ((a - b).norm() / a.norm()).item() < 0.03


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    t = make()
    t["head"].requires_grad_(False)
    loss, _ = fused_loss(**t, kl=1.0, ce=1.0)
    backward(loss)
    assert t["head"].grad is None
    assert t["hidden"].grad is not None


def test_inputs_are_not_changed_and_noncontiguous_ones_work() -> None:
    t = make()
    wide = torch.cat([t["hidden"].detach()] * 2, dim=1)
    view = wide[:, :D]
    before = {k: v.detach().clone() for k, v in t.items()}
    a, _ = fused_loss(**{**t, "hidden": view}, kl=1.0, ce=1.0, temperature=3.0)
    b, _ = fused_loss(**t, kl=1.0, ce=1.0, temperature=3.0)
    assert a.item() == b.item()
    for name, value in before.items():
        assert torch.equal(t[name].detach(), value)


def test_divergence_without_a_teacher_is_refused() -> None:
    t = make()
    with pytest.raises(ValueError, match="teacher"):
        fused_loss(t["hidden"], t["head"], t["targets"], kl=1.0)


def test_negative_log_likelihood_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda _: 4)
    t = make(dtype=torch.float32)
    ours = negative_log_likelihood(t["hidden"], t["head"], t["targets"])
    expected = functional.cross_entropy(t["hidden"] @ t["head"].t(), t["targets"], reduction="none")
    torch.testing.assert_close(ours, expected.detach())
    assert negative_log_likelihood(t["hidden"][:0], t["head"], t["targets"][:0]).shape == (0,)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_of_the_size_of_the_logits_is_ever_allocated() -> None:
    tokens, rows, width = 1024, 8192, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = torch.randn(rows, width, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    with Largest() as fused:
        loss, _ = fused_loss(
            hidden, head, targets, teacher_hidden=hidden.detach(), teacher_head=head.detach(), kl=1.0, ce=1.0
        )
        backward(loss)
    assert fused.numel == losses.chunk_tokens(rows) * rows <= tokens * rows // 4
    with Largest() as textbook:
        backward(functional.cross_entropy(hidden @ head.t(), targets))
    assert textbook.numel == tokens * rows  # the measurement can see it
