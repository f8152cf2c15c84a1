"""What a `moe` stage may say: the trunk, the experts, and how the router is made.

    trunk: base
    experts: [{name: math, model: math}, {name: code, model: runs/code}]
    top_k: 2
    router: {fit: ridge, data: {math: data/math.jsonl, code: data/code.jsonl}}

Read docs/moe.md for what the settings do to the result.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from solera_core.data import DataSource
from solera_core.strict import Strict, did_you_mean

__all__ = ["ExpertConfig", "MoeConfig", "RouterConfig"]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_as_list), Field(min_length=1)]


class ExpertConfig(Strict):
    """One specialist: its feed-forward network becomes an expert in every layer.

    Attributes:
        name: how data, reports and provenance call it.
        model: a stage, a directory, a hub id, or any of these with `+lora`.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)


class RouterConfig(Strict):
    """How the router, one E x D matrix a layer, is made.

    Attributes:
        fit: `ridge` solves for it in closed form from text of every expert's domain; `random` draws it as Mixtral
            initialises its own, for people who will train it.
        data: expert name -> text of its domain. Needed by `ridge`; refused by `random`, which would not use it.
        tokens_per_domain: tokens of every domain that go into the fit, besides those held out.
        holdout: share of the calibration documents that the fit never sees; the temperature is chosen on them, and
            the facts in `solera.json` are measured on them.
        ridge: penalty, relative to the mean diagonal of X'X.
        temperature: the router's logits are divided by it. `auto` chooses it by the negative log-likelihood of the
            held-out text under the whole MoE. A random router stands as drawn under `auto`.
        sequence_tokens: calibration text is cut into sequences of this length (at most the trunk's positions).
    """

    fit: Literal["ridge", "random"] = "ridge"
    data: dict[str, Sources] = Field(default_factory=dict[str, tuple[DataSource, ...]])
    tokens_per_domain: int = Field(default=20_000, ge=1)
    holdout: float = Field(default=0.2, gt=0, lt=1)
    ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    temperature: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    sequence_tokens: int = Field(default=256, ge=2)


class MoeConfig(Strict):
    """A sparse mixture of experts, out of dense specialists of one base.

    Attributes:
        target: the format; `auto`: the one that holds the models exactly and that most of `engines` run exactly.
        engines: that shall run it.
        trunk: the model that attention, norms, embeddings and head are taken from.
        experts: two or more specialists.
        top_k: experts that work on a token.
        dtype: of everything written; null keeps the trunk's own, tensor by tensor.
        router: how tokens find their experts.
    """

    trunk: str = Field(min_length=1)
    experts: tuple[ExpertConfig, ...] = Field(min_length=2)
    top_k: int = Field(default=2, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    target: Literal[
        "auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared", "flex_olmo", "olmoe"
    ] = "auto"
    engines: tuple[Literal["transformers", "vllm", "llama.cpp"], ...] = ("transformers", "vllm", "llama.cpp")
    router: RouterConfig = Field(default_factory=RouterConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [expert.name for expert in self.experts]
        problems = [
            f"experts: the name {name!r} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1
        ]
        refs = [expert.model for expert in self.experts]
        problems += [
            f"experts: the model {ref!r} is given twice; two equal experts only waste memory"
            for ref in dict.fromkeys(refs)
            if refs.count(ref) > 1
        ]
        if self.top_k > len(names):
            problems.append(f"top_k: {self.top_k} experts a token asked, but there are only {len(names)}")
        problems += [
            f"router.data.{name}: no such expert{did_you_mean(name, names)}"
            for name in self.router.data
            if name not in names
        ]
        if self.router.fit == "ridge" and (missing := [name for name in names if name not in self.router.data]):
            problems.append(
                f"router.data: no text for {', '.join(missing)}; fit: ridge needs some of every expert's domain "
                "(or use fit: random and train the router)"
            )
        if self.router.fit == "random" and self.router.data:
            problems.append("router.data: fit: random does not use it; remove it or use fit: ridge")
        if problems:
            raise ValueError("; ".join(problems))
        return self
