"""Which parameters are what: feed-forward, attention, norms, embeddings, router."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from torch import nn

from solera_core.errors import ConfigError
from solera_distill.config import Part

__all__ = ["freeze_all_but", "groups", "part_of_parameters"]

# The first that matches counts. Searched in the names of modules below a layer, not in those of the whole model.
_BY_NAME: Final[tuple[tuple[Part, re.Pattern[str]], ...]] = (
    ("attention", re.compile(r"attn|attention")),
    ("router", re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")),
    ("ffn", re.compile(r"mlp|ffn|feed_forward|feedforward|experts?(\.|$)|block_sparse_moe|shared_expert")),
)


def part_of_parameters(model: nn.Module) -> dict[str, Part | None]:
    """The part of every parameter by name; None where it is none of them.

    Embeddings (with the output head) and norms are known by the class of their module, the rest by its name; a norm
    inside attention is a norm. In a mixture of experts, `router` is what chooses and `ffn` are all experts.
    """
    by_module: dict[str, Part] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            by_module[name] = "embeddings"
        elif "norm" in type(module).__name__.lower():
            by_module[name] = "norms"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        by_module |= {name: "embeddings" for name, module in model.named_modules() if module is head}
    return {name: by_module.get(name.rpartition(".")[0]) or _by_name(name) for name, _ in model.named_parameters()}


def _by_name(name: str) -> Part | None:
    return next((part for part, pattern in _BY_NAME if pattern.search(name)), None)


def freeze_all_but(model: nn.Module, parts: Collection[Part] | str) -> dict[str, Part | None]:
    """Let only the parameters of `parts` (or `all`) train; returns the part of every parameter.

    Raises:
        ConfigError: a part that the model does not have, or a parameter of no known part while not all train.
    """
    found = part_of_parameters(model)
    if isinstance(parts, str):
        model.requires_grad_(True)
        return found
    if absent := sorted(set(parts) - set(found.values()) - {None}):
        present = sorted({p for p in found.values() if p is not None})
        raise ConfigError(f"parts: this model has no {', '.join(absent)} (it has: {', '.join(present)})")
    if unknown := [name for name, part in found.items() if part is None]:
        raise ConfigError(
            f"parts: parameter {unknown[0]!r} is none of ffn, attention, norms, embeddings, router, so it is not clear "
            "whether it should train; use `parts: all`"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(found[name] in parts)
    return found


def groups(
    model: nn.Module, part_of: Mapping[str, Part | None], *, lr_parts: Mapping[Part, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that train: equal multiplier of the rate (`share`) and equal weight decay.

    Decay is for matrices: not for norms and biases (one dimension), and not for embeddings, whose rows are seen at very
    different rates, so that decay would shrink rare tokens.

    Raises:
        ConfigError: `lr_parts` names a part that the model does not have.
    """
    if absent := sorted(set(lr_parts) - {p for p in part_of.values() if p is not None}):
        raise ConfigError(f"lr_parts: this model has no {', '.join(absent)}")
    gathered: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of[name]
            share = lr_parts.get(part, 1.0) if part is not None else 1.0
            decay = weight_decay if parameter.ndim > 1 and part != "embeddings" else 0.0
            gathered.setdefault((share, decay), []).append(parameter)
    return [
        {"params": parameters, "share": share, "weight_decay": decay, "lr": 0.0}
        for (share, decay), parameters in gathered.items()
    ]


def trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters that train, in the model's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
