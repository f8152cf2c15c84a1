"""A randomly initialised model of any architecture that transformers knows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from solera_core.errors import ConfigError
from solera_core.strict import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["build_config", "build_model", "count_parameters"]

_DECIDED: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "model_type", "architectures", "dtype")


def build_config(architecture: str, settings: Mapping[str, Any], *, tokens: int) -> "PreTrainedConfig":
    """The config of the model to be, for a tokenizer of `tokens` tokens with BOS 0 and EOS 1.

    transformers takes any keyword into a config and ignores what it does not know; here a key that the architecture
    does not have is an error.

    Raises:
        ConfigError: unknown architecture or key, a value that it refuses, or a vocabulary smaller than the tokenizer's.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if architecture not in CONFIG_MAPPING:
        raise ConfigError(
            f"architecture: {architecture!r} is not known{did_you_mean(architecture, CONFIG_MAPPING.keys())}"
        )
    config_class = CONFIG_MAPPING[architecture]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"architecture: {architecture!r} has no causal language model")
    known = set(config_class().to_dict()) | {"rope_theta", "rope_scaling"} - set(_DECIDED)
    for key in settings:
        if key in _DECIDED:
            raise ConfigError(
                f"config.{key}: is decided by the tokenizer or by `architecture` and `dtype`; leave it out"
            )
        if key not in known:
            raise ConfigError(f"config.{key}: {architecture} has no such setting{did_you_mean(key, known)}")
    rows = settings.get("vocab_size", tokens)
    if not isinstance(rows, int) or rows < tokens:
        raise ConfigError(f"config.vocab_size: {rows} rows are fewer than the tokenizer's {tokens} tokens")
    try:
        return config_class(
            **{**settings, "vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
        )
    except Exception as e:  # each config class validates in its own way, with its own exceptions
        raise ConfigError(f"config: {architecture} refuses it: {e}") from e


def build_model(config: "PreTrainedConfig", *, seed: int) -> "PreTrainedModel":
    """The model with float32 weights drawn as its own code draws them, from `seed` alone.

    Raises:
        ConfigError: the settings do not fit together.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return, no-untyped-call]
        except (ValueError, RuntimeError, TypeError, KeyError, AssertionError, ZeroDivisionError) as e:
            raise ConfigError(f"config: {config.model_type} cannot be built with it: {e}") from e


def count_parameters(config: "PreTrainedConfig") -> int:
    """Number of parameters, without allocating any."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, seed=0).parameters())
