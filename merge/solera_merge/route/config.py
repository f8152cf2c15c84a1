"""What a `route` stage may say: the specialists, the text that tells them apart, and the method.

base_model: base
specialists: [{name: math, model: math}, {name: code, model: runs/code}]
data: {math: data/math.jsonl, code: data/code.jsonl}
method: auto
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from solera_core.strict import Strict, did_you_mean
from solera_merge.moe.config import Sources

__all__ = ["RouteConfig", "SpecialistConfig"]


class SpecialistConfig(Strict):
    """One whole model, of any architecture and with any tokenizer.

    Attributes:
        name: how data, reports and `route()` call it.
        model: a stage, a directory, a hub id, or any of these with `+lora`.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)


class RouteConfig(Strict):
    """A router over whole models, request by request.

    Attributes:
        specialists: two or more; they are named by reference and digest, not copied.
        base_model: the model whose mean hidden state of a request is what the router sees. A small one does; not
            needed by `cascade`.
        data: domain -> text. Under `labels: domain` the domains are the specialists' names; under `nll` any names.
        method: `centroid`: the nearest domain mean. `kmeans`: clusters of requests, each with the specialist that has
            the smallest loss on it (Avengers, arXiv 2505.19797). `classifier`: multinomial logistic regression.
            `cascade`: the cheapest first, the next when it is not confident. `auto`: the best of the first three.
        labels: what `centroid` and `classifier` learn: the `domain` of a text, or the specialist that predicts it
            best (`nll`).
        clusters: of `kmeans`; null tries some and takes the best.
        confidence: of a `cascade`: mean `log_probability` of the request's tokens, or (less) the mean `entropy` of the
            next token's distribution.
        tolerance: a `cascade` takes the cheapest thresholds whose loss is at most this share above the best ones'.
        documents_per_domain: that go into the fit; every specialist scores all of them.
        holdout: share of the documents that the fit never sees; the report is about them.
        request_tokens: the router looks at the first so many tokens of a request.
        window_tokens: texts are scored in windows of this many tokens.
        dtype: the models are run in.
    """

    specialists: tuple[SpecialistConfig, ...] = Field(min_length=2)
    base_model: Annotated[str, Field(min_length=1)] | None = None
    data: dict[str, Sources] = Field(min_length=1)
    method: Literal["auto", "centroid", "kmeans", "classifier", "cascade"] = "auto"
    labels: Literal["domain", "nll"] = "domain"
    clusters: Annotated[int, Field(ge=1)] | None = None
    confidence: Literal["log_probability", "entropy"] = "log_probability"
    tolerance: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    documents_per_domain: int = Field(default=200, ge=1)
    holdout: float = Field(default=0.25, gt=0, lt=1)
    request_tokens: int = Field(default=256, ge=2)
    window_tokens: int = Field(default=1024, ge=2)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def names(self) -> list[str]:
        """Of the specialists."""
        return [specialist.name for specialist in self.specialists]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names, refs = self.names, [specialist.model for specialist in self.specialists]
        problems = [
            f"specialists: the {what} {x!r} is given twice"
            for what, all_ in (("name", names), ("model", refs))
            for x in dict.fromkeys(all_)
            if all_.count(x) > 1
        ]
        if self.method == "cascade" and self.base_model is not None:
            problems.append("base_model: a cascade asks the specialists themselves; leave it out")
        if self.method != "cascade" and self.base_model is None:
            problems.append(f"base_model: method: {self.method} needs one: its hidden states are what the router sees")
        if self.clusters is not None and self.method not in ("kmeans", "auto"):
            problems.append(f"clusters: method: {self.method} has none")
        if self.needs_domains:
            problems += [
                f"data.{name}: no such specialist{did_you_mean(name, names)}; with `labels: domain` the text is "
                "named after the specialist it belongs to"
                for name in self.data
                if name not in names
            ]
            if missing := [name for name in names if name not in self.data]:
                problems.append(
                    f"data: no text for {', '.join(missing)}; labels: domain needs some of every specialist's domain "
                    "(or use labels: nll)"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def needs_domains(self) -> bool:
        """Whether the domains must be the specialists' names."""
        return self.labels == "domain" and self.method in ("auto", "centroid", "classifier")
