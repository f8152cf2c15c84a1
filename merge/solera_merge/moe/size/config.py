"""What `moe-prune`, `moe-merge-experts` and `moe-extract-lora` may say.

model: ./moe
keep: 4
data: {math: data/math.jsonl, code: data/code.jsonl}

Read docs/moe-size.md for what the settings do to the result.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from solera_core.strict import Strict, did_you_mean
from solera_merge.moe.config import Sources

__all__ = [
    "ExtractExpertsConfig",
    "MergeExpertsConfig",
    "PruneConfig",
    "ShrinkConfig",
    "SpecialistConfig",
    "TextConfig",
]


class TextConfig(Strict):
    """The text that decisions and reports rest on.

    Attributes:
        data: domain -> text. Any names; the report has a column for each.
        holdout: share of the documents of every domain that nothing but the report is made from.
        tokens_per_domain: tokens of every domain that are looked at, besides those held out.
        sequence_tokens: text is cut into sequences of this length (at most the model's positions).
    """

    data: dict[str, Sources] = Field(min_length=1)
    holdout: float = Field(default=0.2, gt=0, lt=1)
    tokens_per_domain: int = Field(default=20_000, ge=1)
    sequence_tokens: int = Field(default=256, ge=2)


class ShrinkConfig(TextConfig):
    """A MoE with fewer experts in every layer.

    Attributes:
        model: a MoE: a stage, a directory or a hub id.
        keep: experts that every layer has afterwards.
        sizes: other numbers of experts whose loss is measured and reported too.
    """

    model: str = Field(min_length=1)
    keep: int = Field(ge=1)
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @field_validator("keep", mode="before")
    @classmethod
    def _one_count(cls, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            raise ValueError("one number: the formats have the same number of experts in every layer")
        return value


class PruneConfig(ShrinkConfig):
    """Leave out the experts that add least.

    Attributes:
        score: what decides: `reap` (arXiv 2510.13999), the mean of weight times output norm over the tokens routed to
            an expert; `contribution`, the same summed instead, so that an expert for rare tokens counts less; or
            `frequency`, how many those are.
    """

    score: Literal["reap", "contribution", "frequency"] = "reap"


class MergeExpertsConfig(ShrinkConfig):
    """Average experts that are alike.

    Attributes:
        group: which become one. `ream` (arXiv 2604.04356): the experts with the highest score take those most like
            them. `m_smoe` (2310.01334): those with the highest score lead, every other joins the one whose router
            logits are most like its own. `hc_smoe` (2410.08589): average linkage of mean outputs.
        group_size: experts in a group of `ream` at most.
        score: which experts lead; null: as the paper of `group` has it: `reap` for `ream`, else `frequency`.
        align: neurons are matched before they are averaged, by their `weights` or their `activations`, or not (`none`).
    """

    group: Literal["ream", "m_smoe", "hc_smoe"] = "ream"
    group_size: int = Field(default=16, ge=2)
    score: Literal["reap", "contribution", "frequency"] | None = None
    align: Literal["weights", "activations", "none"] = "weights"


class SpecialistConfig(Strict):
    """One fine-tune of the base: `name` is what its domain, its adapter and the route call it."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    model: str = Field(min_length=1)


class ExtractExpertsConfig(TextConfig):
    """Specialists as low-rank updates of their base, with a router over requests: no MoE checkpoint.

    Attributes:
        base_model: that all specialists were tuned from.
        specialists: two or more.
        ranks: that are tried; every specialist gets the one with the smallest held-out loss on its domain.
        tolerance: a smaller rank is taken when its loss is at most this share above the best.
        embeddings: changed embedding and head: left out (`skip`), `save`d in full, or as `lora`.
        modules_to_save: other changed tensors (norms): `none` of them, or saved in full (`auto`).
        target_modules: a regular expression; only modules that it matches are captured.
        dtype: of the adapters; null: that of the models.
        method: how the router decides; see `solera route`.
    """

    base_model: str = Field(min_length=1)
    specialists: tuple[SpecialistConfig, ...] = Field(min_length=2)
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(4, 8, 16, 32), min_length=1)
    tolerance: float = Field(default=0.005, ge=0, allow_inf_nan=False)
    embeddings: Literal["save", "lora", "skip"] = "skip"
    modules_to_save: Literal["auto", "none"] = "none"
    target_modules: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    method: Literal["auto", "centroid", "kmeans", "classifier"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [specialist.name for specialist in self.specialists]
        refs = [specialist.model for specialist in self.specialists]
        problems = [
            f"specialists: the {what} {x!r} is given twice"
            for what, all_ in (("name", names), ("model", refs))
            for x in dict.fromkeys(all_)
            if all_.count(x) > 1
        ]
        problems += [
            f"data.{name}: no such specialist{did_you_mean(name, names)}" for name in self.data if name not in names
        ]
        if missing := [name for name in names if name not in self.data]:
            problems.append(f"data: no text for {', '.join(missing)}; ranks are chosen, and requests routed, by it")
        if self.base_model in names:
            problems.append(f"specialists: {self.base_model!r} is what the base is called too; name it otherwise")
        if self.base_model in refs:
            problems.append(f"specialists: {self.base_model!r} is the base itself; it has no update to extract")
        if problems:
            raise ValueError("; ".join(problems))
        return self
