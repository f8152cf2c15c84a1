"""mergekit-moe's YAML, said in solera's words.

base_model, experts[].source_model, positive_prompts, negative_prompts, noise_scale, residual_scale, gate_mode,
dtype, experts_per_token, architecture
"""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["from_mergekit", "is_mergekit"]

_MODES: Final = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
_ONLY_THERE: Final = ("gate_mode", "experts_per_token", "shared_experts", "architecture")
_EXPERT_KEYS: Final = {"source_model": "model", "positive_prompts": "prompts"}
_TARGETS: Final = {"mixtral": "mixtral", "qwen3": "qwen3_moe", "qwen2": "qwen2_moe", "qwen": "qwen2_moe"}


def is_mergekit(settings: Any) -> bool:
    """Whether settings of a MoE are mergekit-moe's."""
    if not isinstance(settings, Mapping):
        return False
    experts = settings.get("experts")
    sources = isinstance(experts, list) and any(isinstance(e, Mapping) and "source_model" in e for e in experts)
    return sources or any(key in settings for key in _ONLY_THERE)


def from_mergekit(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same in solera's words; keys that neither knows stay, and are refused where all unknown keys are.

    Raises:
        ValueError: what solera does otherwise on purpose (see docs/parity.md), with the way out.
    """
    rest = dict(settings)
    shared = _shared(rest.pop("shared_experts", None))
    mode = rest.pop("gate_mode", "hidden")
    if mode not in _MODES:
        raise ValueError(f"gate_mode: {mode!r} is none of {', '.join(_MODES)}")
    found: dict[str, Any] = {
        **({"base_model": rest.pop("base_model")} if "base_model" in rest else {}),
        **({"shared": shared} if shared else {}),
        "router": {"fit": f"mergekit_{'hidden' if mode == 'hidden_last' else mode}"},
        **({"top_k": rest.pop("experts_per_token")} if "experts_per_token" in rest else {}),
    }
    if (architecture := rest.pop("architecture", None)) is not None:
        found["target"] = _target(str(architecture))
    experts = rest.pop("experts", None)
    if isinstance(experts, list):
        names = _names([expert.get("source_model") for expert in experts if isinstance(expert, Mapping)])
        experts = [
            {"name": name, **{_EXPERT_KEYS.get(key, key): value for key, value in expert.items() if value is not None}}
            if isinstance(expert, Mapping)
            else expert
            for name, expert in zip(names, experts, strict=False)
        ]
    return {**found, "experts": experts, **rest}


def _shared(experts: Any) -> dict[str, Any] | None:
    """Its shared expert: added to what the routed ones give, times a factor.

    There the factor is a sigmoid of the prompts' vector; here it is that of zero, one half, for every token.
    """
    if not experts:
        return None
    if not isinstance(experts, list) or len(experts) > 1 or not isinstance(experts[0], Mapping):
        raise ValueError("shared_experts: one is possible, as a list of one")
    rest = {key: value for key, value in experts[0].items() if key not in ("positive_prompts", "negative_prompts")}
    if rest.pop("noise_scale", None):
        raise ValueError("shared_experts: noise_scale: a shared expert is taken as it is; remove it")
    scale = rest.pop("residual_scale", None)
    scale = 1.0 if scale is None else scale
    half = scale / 2 if isinstance(scale, int | float) else scale
    return {"model": rest.pop("source_model", None), "residual_scale": half, "routed_scale": 1.0, **rest}


def _target(architecture: str) -> str:
    lowered = architecture.lower()
    if lowered.startswith("deepseek"):
        raise ValueError(
            f"architecture: {architecture!r}: mergekit's DeepSeek output needs Python code from the hub; leave it out"
        )
    for prefix, target in _TARGETS.items():
        if lowered.startswith(prefix):
            return target
    raise ValueError(f"architecture: {architecture!r} is none that is known here: {', '.join(_TARGETS)}")


def _names(models: list[Any]) -> list[str]:
    """A name for every expert: the last part of its model's, numbered where that is not enough."""
    found: list[str] = []
    for model in models:
        name = str(model).rpartition("+")[0] or str(model)
        name = name.rstrip("/").rpartition("/")[2].partition("@")[0] or "expert"
        again = sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(f"{name}-{again + 1}" if again else name)
    return found
