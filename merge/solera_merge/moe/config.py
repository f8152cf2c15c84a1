"""What a `moe` stage may say: the base, the experts, and how the router is made.

    base_model: base
    experts: [{name: math, model: math}, {name: code, model: runs/code}]
    top_k: 2
    router: {fit: ridge, data: {math: data/math.jsonl, code: data/code.jsonl}}

Read docs/moe.md for what the settings do to the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from solera_core.data import DataSource
from solera_core.strict import Strict, did_you_mean
from solera_core.tokens import TokenCount
from solera_merge.moe.mergekit import from_mergekit, is_mergekit
from solera_merge.moe.sizes_config import SharedConfig, SlimConfig, size_problems
from solera_merge.moe.trunk_config import Trunk, named_models, trunk_problems

__all__ = [
    "AUTO",
    "FITS",
    "ExpertConfig",
    "Fit",
    "Healing",
    "MoeConfig",
    "RouterConfig",
    "RouterTraining",
    "prompt_problems",
]


@dataclass(frozen=True)
class Fit:
    """What a way of making the router needs, and what it does with what it is given.

    Attributes:
        data: needs text of every expert's domain (else such text may be given, and everything is measured on it).
        unlabelled: what it does with `unlabelled` text.
        prompts: what it does with the experts' prompts.
        tuned: `temperature: auto` searches where there is held-out text (else the router stands as it is made).
        extends: made of sums alone, so an expert can be added without the text of the others.
    """

    data: bool = False
    unlabelled: Literal["needed", "used", "refused"] = "refused"
    prompts: Literal["needed", "ignored", "refused"] = "refused"
    tuned: bool = False
    extends: bool = False


_SUMS: Final = Fit(data=True, tuned=True, extends=True)
_PROMPTED: Final = Fit(prompts="needed")
_COMPARED: Final = Fit(prompts="ignored")

FITS: Final[dict[str, Fit]] = {
    "ridge": _SUMS,
    "lda": _SUMS,
    "centroid": _SUMS,
    "logistic": Fit(data=True, tuned=True),
    "nll": Fit(unlabelled="needed", tuned=True),
    "auto": Fit(data=True, unlabelled="used", tuned=True, extends=True),
    "prompts": Fit(prompts="needed", tuned=True),
    "random": Fit(),
    "uniform": Fit(),
    "none": Fit(),
    "mergekit_hidden": _PROMPTED,
    "mergekit_hidden_avg": _PROMPTED,
    "mergekit_cheap_embed": _PROMPTED,
    "mergekit_random": _COMPARED,
    "mergekit_uniform_random": _COMPARED,
}
"""Every `router.fit`."""

AUTO: Final = ("ridge", "lda", "centroid", "logistic", "nll")
"""What `auto` compares, the simpler first; `nll` where there is unlabelled text, `logistic` where all text is there."""


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_as_list), Field(min_length=1)]


class ExpertConfig(Strict):
    """One specialist: its feed-forward network becomes an expert in every layer.

    Attributes:
        name: how data, reports and provenance call it.
        model: a stage, a directory, a hub id, or any of these with `+lora`.
        prompts: texts that shall find this expert, for routers made of prompts.
        negative_prompts: texts that shall not.
        residual_scale: its feed-forward networks' output is multiplied by this.
        noise_scale: standard deviation of noise on every weight of its feed-forward networks.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float = Field(default=1.0, allow_inf_nan=False)
    noise_scale: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class RouterConfig(Strict):
    """How the router, one E x D matrix a layer, is made.

    Attributes:
        fit: `ridge`, `lda`, `centroid` solve for it in closed form from text of every expert's domain, `logistic` by
            L-BFGS. `nll`: from text of unknown domains, labelled by the specialists' own losses. `auto`: the one of
            these with the smallest loss on held-out text. `prompts`: from the experts' `prompts`. `random`, `uniform`:
            drawn as Mixtral or as a linear layer initialises its own, `none`: zeros; for people who will train it.
            `mergekit_...`: as mergekit-moe's gate modes make it, for comparison.
        data: expert name -> text of its domain. With a fit that does not learn from it the temperature is chosen, and
            everything is measured, on it.
        unlabelled: text of any domain, for `nll` and `auto`.
        tokens_per_domain: tokens of every domain that go into the fit, besides those held out.
        holdout: share of the calibration documents that the fit never sees; the temperature is chosen on them, and
            the facts in `solera.json` are measured on them.
        ridge: penalty of `ridge`, `logistic` and `nll`, relative to the mean diagonal of X'X.
        shrinkage: of the covariance in `lda`, towards a multiple of the identity; at 1 it is `centroid`.
        temperature: the router's logits are divided by it. `auto` chooses it by the negative log-likelihood of the
            held-out text under the whole MoE, where there is some. Routers that are drawn, and mergekit's, stand as
            they are made under `auto`.
        sequence_tokens: calibration text is cut into sequences of this length (at most the trunk's positions).
    """

    fit: Literal[
        "ridge",
        "lda",
        "centroid",
        "logistic",
        "nll",
        "auto",
        "prompts",
        "random",
        "uniform",
        "none",
        "mergekit_hidden",
        "mergekit_hidden_avg",
        "mergekit_cheap_embed",
        "mergekit_random",
        "mergekit_uniform_random",
    ] = "ridge"
    data: dict[str, Sources] = Field(default_factory=dict[str, tuple[DataSource, ...]])
    unlabelled: Annotated[tuple[DataSource, ...], BeforeValidator(_as_list)] = ()
    tokens_per_domain: int = Field(default=20_000, ge=1)
    holdout: float = Field(default=0.2, gt=0, lt=1)
    ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    shrinkage: float = Field(default=0.1, gt=0, le=1)
    temperature: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    sequence_tokens: int = Field(default=256, ge=2)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of every domain that are measured on, at most."""
        return max(round(self.tokens_per_domain * self.holdout / (1 - self.holdout)), 2)


class RouterTraining(Strict):
    """Training of the router alone, on the text of all domains, by the loss of the language model.

    Attributes:
        tokens: to train on, at most: it ends when the held-out loss falls no more, and the best router is kept.
        lr: peak learning rate.
        balance: weight of the load-balancing loss, E * sum f_e P_e (arXiv 2101.03961).
        tokens_per_step: tokens of one optimizer step.
        micro_batch_tokens: tokens in one forward pass at most; bounds memory. The load is counted in each by itself.
        patience: looks at the held-out text, of 20 in all, without a lower loss before it ends.
    """

    tokens: TokenCount
    lr: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    balance: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    tokens_per_step: TokenCount = 2048
    micro_batch_tokens: TokenCount = 4096
    patience: int = Field(default=5, ge=1)


class Healing(Strict):
    """The specialists teach the MoE: forward KL from the specialist of each text.

    Attributes:
        tokens: to train on.
        parts: `router+trunk` leaves the experts as they are; `all` trains them too.
        lr: peak learning rate. Right for models of about a million parameters; take 1e-4 to 1e-5 for billions.
        tokens_per_step: tokens of one optimizer step.
        micro_batch_tokens: tokens in one forward pass at most; bounds memory only.
        precision: of the forward and backward passes.
        ce: weight of the cross-entropy with the text itself beside the divergence.
        balance: weight of the load-balancing loss.
        save_every: a killed run loses at most this many tokens.
        control: teach a dense model of the base's size in the same way too, and compare.
    """

    tokens: TokenCount
    parts: Literal["router+trunk", "all"] = "all"
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    tokens_per_step: TokenCount = 4096
    micro_batch_tokens: TokenCount = 4096
    precision: Literal["float32", "bfloat16"] = "float32"
    ce: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    balance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    save_every: TokenCount = 500_000
    control: bool = True


class MoeConfig(Strict):
    """A sparse mixture of experts, out of dense specialists of one base.

    Attributes:
        target: the format; `auto`: the one that holds the models exactly and that most of `engines` run exactly.
        engines: that shall run it.
        base_model: that the experts were tuned from.
        trunk: where attention, norms, embeddings and head come from: `base`, the `average` of the experts, the name of
            one of them, `{merge: {...}}`, or `auto`: what is best on held-out text.
        extend: a MoE built by solera, in the place of `base_model`: its trunk and its experts stay, `experts` come
            behind them, and its router is fitted anew from the sums saved beside it; only the new experts need text.
        experts: two or more specialists; with `extend` one or more.
        top_k: experts that work on a token.
        dtype: of everything written; null keeps the trunk's own, tensor by tensor.
        shared: an expert that works on every token.
        slim: experts with fewer neurons.
        router: how tokens find their experts.
        train: train the router on the text of `router.data` when it is made.
        heal: let the specialists teach the MoE, last.
    """

    base_model: str | None = Field(default=None, min_length=1)
    trunk: Trunk = "base"
    extend: str | None = Field(default=None, min_length=1)
    experts: tuple[ExpertConfig, ...] = Field(min_length=1)
    top_k: int = Field(default=2, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    target: Literal[
        "auto", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared", "flex_olmo", "olmoe"
    ] = "auto"
    engines: tuple[Literal["transformers", "vllm", "llama.cpp"], ...] = ("transformers", "vllm", "llama.cpp")
    shared: SharedConfig | None = None
    slim: SlimConfig | None = None
    router: RouterConfig = Field(default_factory=RouterConfig)
    train: RouterTraining | None = None
    heal: Healing | None = None

    @model_validator(mode="before")
    @classmethod
    def _mergekit(cls, settings: Any) -> Any:
        if is_mergekit(settings):
            return from_mergekit(settings)
        if isinstance(settings, Mapping) and "trunk" in settings and "base_model" not in settings:
            raise ValueError(
                "base_model: missing; it names the model that the experts were tuned from. (`trunk` says which weights "
                "the attention, norms and embeddings come from, and may be left out)"
            )
        if isinstance(settings, Mapping) and "trunk" in settings:
            trunk = named_models(settings["trunk"], settings.get("base_model"), settings.get("experts"))
            return {**settings, "trunk": trunk}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [expert.name for expert in self.experts]
        problems = [
            f"experts: the name {name!r} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1
        ]
        refs = [expert.model for expert in self.experts if expert.noise_scale == 0]
        problems += [
            f"experts: the model {ref!r} is given twice; two equal experts only waste memory"
            for ref in dict.fromkeys(refs)
            if refs.count(ref) > 1
        ]
        if self.extend is None:
            if self.base_model is None:
                problems.append("base_model: is missing")
            if len(names) < 2:
                problems.append("experts: at least 2 are needed")
            if self.top_k > len(names):
                problems.append(f"top_k: {self.top_k} experts a token asked, but there are only {len(names)}")
            problems += data_problems(self.router, names)
        else:
            if self.base_model is not None:
                problems.append("base_model: extend keeps the trunk of the MoE that it extends; remove one of the two")
            if self.trunk != "base":
                problems.append("trunk: extend keeps the trunk of the MoE that it extends; remove one of the two")
            problems += extend_problems(self.router, names)
        problems += prompt_problems(self.experts, self.router.fit)
        problems += size_problems(
            self.shared, self.slim, has_text=bool(self.router.data), extends=self.extend is not None
        )
        problems += trunk_problems(self.trunk, names, has_text=bool(self.router.data))
        problems += training_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def training_problems(config: MoeConfig) -> list[str]:
    """What is wrong with `train` and `heal`."""
    asked = [name for name in ("train", "heal") if getattr(config, name) is not None]
    problems = []
    if asked and not config.router.data:
        problems.append(f"{asked[0]}: trains on the text of every domain; give router.data")
    if asked and config.extend is not None:
        problems.append(
            f"{asked[0]}: extend has no specialists behind the experts of the old MoE, and not all of the text; build "
            "the MoE anew from all specialists, or use a `distill` stage"
        )
    if config.train is not None and config.top_k == 1:
        problems.append(
            "train: with top_k: 1 the one weight is always 1, so the loss does not depend on the router and its "
            "gradient is exactly zero; use top_k: 2 or more, or leave train out (a fitted router needs none)"
        )
    return problems


def data_problems(router: RouterConfig, names: list[str]) -> list[str]:
    """What is wrong with the text for a router made in this way, of a MoE of these experts."""
    needs = FITS[router.fit]
    problems = [
        f"router.data.{name}: no such expert{did_you_mean(name, names)}" for name in router.data if name not in names
    ]
    if missing := [name for name in names if name not in router.data]:
        if needs.data:
            problems.append(
                f"router.data: no text for {', '.join(missing)}; fit: {router.fit} needs some of every expert's "
                "domain (or use fit: random and train the router)"
            )
        elif router.data:
            problems.append(
                f"router.data: no text for {', '.join(missing)}; what is measured on one domain must be measured on all"
            )
    return problems + _unlabelled_problems(router)


def extend_problems(router: RouterConfig, new: list[str]) -> list[str]:
    """What is wrong with the settings of a router that is extended by these experts."""
    if not FITS[router.fit].extends:
        able = ", ".join(name for name, fit in FITS.items() if fit.extends)
        return [f"router.fit: {router.fit} cannot add an expert to sums that were saved; use one of {able}"]
    problems = _unlabelled_problems(router)
    if router.unlabelled:
        problems.append("router.unlabelled: extend has no specialists that could label it; remove it")
    if missing := [name for name in new if name not in router.data]:
        problems.append(f"router.data: no text for {', '.join(missing)}; every new expert needs some of its domain")
    return problems


def _unlabelled_problems(router: RouterConfig) -> list[str]:
    does = FITS[router.fit].unlabelled
    if does == "needed" and not router.unlabelled:
        return [f"router.unlabelled: no text; fit: {router.fit} needs some, of all domains together"]
    if does == "refused" and router.unlabelled:
        return [f"router.unlabelled: fit: {router.fit} does not use it; remove it or use fit: nll or auto"]
    return []


def prompt_problems(experts: tuple[ExpertConfig, ...], fit: str) -> list[str]:
    """What is wrong with the experts' prompts for a router made in this way."""
    problems = [
        f"experts: {expert.name!r}: a prompt is empty"
        for expert in experts
        if any(not prompt.strip() for prompt in (*expert.prompts, *expert.negative_prompts))
    ]
    given = {expert.name: (expert.prompts, expert.negative_prompts) for expert in experts}
    does = FITS[fit].prompts
    if does == "needed":
        if missing := [name for name, (prompts, _) in given.items() if not prompts]:
            problems.append(f"experts: {', '.join(missing)}: no prompts, and router.fit: {fit} is made of them")
        elif len(set(given.values())) == 1:
            problems.append("experts: all have the same prompts, so no router can tell them apart")
    elif does == "refused" and any(prompts or negative for prompts, negative in given.values()):
        problems.append(f"experts: prompts: router.fit: {fit} does not use them; remove them or use fit: prompts")
    return problems
