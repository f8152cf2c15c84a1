"""Losses over a vocabulary that never exist in full: hidden states and output matrices in, a number and gradients out.

Shapes: N tokens to be learned, D student width, E teacher width, V student rows, U teacher rows, C tokens of a chunk.

A row of logits takes V numbers a token, and the textbook loss keeps several of them for the backward pass. Here tokens
go through in chunks: logits, loss, and at once the gradient with respect to the logits, contracted with hidden state
and matrix while it is in cache. Nothing of size N x V is ever allocated, and no product is computed twice. The price:
the loss must be the last operation of the graph, and everything that reads logits must be part of it.
"""

from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["fused_loss", "negative_log_likelihood"]

_CACHED_BYTES: Final = 1 << 22
"""Float32 logits of one chunk where the vocabulary is small: in cache, where the passes over them are cheapest."""

_CHUNK_TOKENS: Final = 256
"""Tokens of one chunk where the vocabulary is large: every chunk rewrites the whole gradient of the output matrix,
which fewer tokens would not pay for,"""

_CHUNK_BYTES: Final = 1 << 25
"""as long as their logits stay below this size."""


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    kl: float = 0.0,
    ce: float = 1.0,
    temperature: float = 1.0,
    scale: float = 1.0,
    matmul: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale * sum_n [kl T^2 KL(p_n || q_n) + ce (-log q_n(y_n))]`, with the gradients made on the way.

    p = softmax of the teacher's logits / T over the rows that both matrices have; q = softmax of the student's
    logits / T over all of its rows. Where the two vocabularies are padded to different sizes, rows that only the
    teacher has stand for no token and are left out, and rows that only the student has are given probability 0 to
    learn. (Giving them logit 0, or leaving them out, would let probability collect on tokens that do not exist.) The
    factor T^2 keeps the size of the gradient independent of T (Hinton et al., arXiv 1503.02531,
    section 2). CE is at temperature 1.

    Gradients with respect to the student's logits: `kl T (q - p) + ce (q - onehot(y))`.

    Args:
        hidden: (N, D) the student's last hidden states.
        head: (V, D) the student's output matrix.
        targets: (N,) the tokens to be learned; only CE reads them.
        teacher_hidden: (N, E), needed when `kl` is not 0; no gradient.
        teacher_head: (U, E).
        kl: weight of the divergence.
        ce: weight of the cross-entropy.
        temperature: T.
        scale: of the whole, usually 1 / tokens of the optimizer step.
        matmul: dtype of the matrix products (default: that of `hidden`); softmax and sums are float32 at least.

    Returns:
        The loss, differentiable in `hidden` and `head`; and (2,), detached: the sums over tokens of T^2 KL and of CE,
        unweighted and unscaled (0 where the weight is 0).

    Example:
        >>> h, w, y = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8), torch.zeros(5, dtype=torch.long)
        >>> loss, _ = fused_loss(h, w, y, teacher_hidden=h.detach(), teacher_head=w, kl=1.0, ce=0.0)
        >>> loss.backward()  # loss and h.grad are exactly 0
    """
    if kl and (teacher_hidden is None or teacher_head is None):
        raise ValueError("kl needs the teacher's hidden states and head")
    return _FusedLoss.apply(  # type: ignore[no-any-return, no-untyped-call]  # torch ships apply untyped
        hidden, head, targets, teacher_hidden, teacher_head, kl, ce, temperature, scale, matmul or hidden.dtype
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        teacher_NE: Tensor | None,
        teacher_head_UE: Tensor | None,
        kl: float,
        ce: float,
        temperature: float,
        scale: float,
        matmul: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        vocabulary = head_VD.shape[0]
        with torch.autocast(hidden_ND.device.type, enabled=False):  # every cast is written out here
            head = head_VD.to(matmul)
            teacher_head = None
            if kl and teacher_head_UE is not None:
                teacher_head = teacher_head_UE[:vocabulary].to(matmul)
            grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
            grad_head = torch.zeros(head_VD.shape, dtype=exact, device=head.device) if ctx.needs_input_grad[1] else None
            sums = torch.zeros(2, dtype=torch.float64, device=head.device)
            for at in range(0, hidden_ND.shape[0], step := chunk_tokens(vocabulary)):
                hidden = hidden_ND[at : at + step].to(matmul)
                logits_CV = torch.mm(hidden, head.t()).to(exact)
                dlogits_CV: Tensor | None = None
                if teacher_head is not None and teacher_NE is not None:
                    teacher_CU = torch.mm(teacher_NE[at : at + step].to(matmul), teacher_head.t()).to(exact)
                    divergence, dlogits_CV = _kl(logits_CV, teacher_CU, temperature)
                    del teacher_CU
                    sums[0] += divergence
                    dlogits_CV *= kl * scale
                if ce:
                    entropy, dce_CV = _ce(logits_CV, targets_N[at : at + step])
                    sums[1] += entropy
                    dce_CV *= ce * scale
                    dlogits_CV = dce_CV if dlogits_CV is None else dlogits_CV.add_(dce_CV)
                    del dce_CV
                del logits_CV
                if dlogits_CV is None:
                    continue
                dlogits = dlogits_CV.to(matmul)
                if grad_hidden is not None:
                    grad_hidden[at : at + step] = torch.mm(dlogits, head)
                if grad_head is not None:
                    if matmul == exact:
                        grad_head.addmm_(dlogits.t(), hidden)
                    else:
                        grad_head += torch.mm(dlogits.t(), hidden)
        ctx.gradients = (grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        loss = (scale * (kl * sums[0] + ce * sums[1])).to(exact)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's type, not ours
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_loss = grad_outputs[0]
        grad_hidden, grad_head = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients)
        return (grad_hidden, grad_head, *(None,) * 8)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of one chunk, by measurement: 4 MB of logits at V = 1024 and 32 MB at V = 32000 were the fastest."""
    row = 4 * vocabulary
    return max(64, _CACHED_BYTES // row, min(_CHUNK_TOKENS, _CHUNK_BYTES // row))


def _kl(logits_CV: Tensor, teacher_CU: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`T^2 KL(p || q)` summed over tokens, and its gradient `T (q - p)`; U <= V. The inputs are not changed."""
    common = teacher_CU.shape[1]
    log_p = torch.log_softmax(teacher_CU / temperature if temperature != 1.0 else teacher_CU, dim=-1)
    log_q = torch.log_softmax(logits_CV / temperature if temperature != 1.0 else logits_CV, dim=-1)
    p = log_p.exp()
    divergence = log_p.sub_(log_q[:, :common]).mul_(p).sum(dim=-1).sum(dtype=torch.float64)
    dlogits = log_q.exp_()
    dlogits[:, :common] -= p
    return temperature * temperature * divergence, dlogits.mul_(temperature)


def _ce(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over tokens, and its gradient `q - onehot`. The inputs are not changed."""
    log_q = torch.log_softmax(logits_CV, dim=-1)
    index = targets_C.unsqueeze(1)
    entropy = -log_q.gather(1, index).sum(dtype=torch.float64)
    dlogits = log_q.exp_()
    dlogits.scatter_add_(1, index, dlogits.new_full(index.shape, -1.0))
    return entropy, dlogits


@torch.no_grad()
def negative_log_likelihood(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """(N,) `-log q_n(y_n)` in nats, float32, chunked as above."""
    step = chunk_tokens(head_VD.shape[0])
    parts = [
        torch.log_softmax(torch.mm(hidden_ND[at : at + step], head_VD.t()).float(), dim=-1)
        .gather(1, targets_N[at : at + step].unsqueeze(1))
        .squeeze(1)
        for at in range(0, hidden_ND.shape[0], step)
    ]
    return -torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)
