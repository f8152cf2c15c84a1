"""What a `moe` stage may say about sizes: neurons that all experts share, and experts made slimmer."""

from typing import Literal, Self

from pydantic import Field, model_validator

from solera_core.strict import Strict

__all__ = ["SharedConfig", "SlimConfig", "size_problems"]


class SharedConfig(Strict):
    """An expert that works on every token: a model's feed-forward networks, or neurons that the experts have in common.

    Attributes:
        model: its feed-forward networks are the shared expert, beside the routed ones.
        residual_scale: with `model`: factor on what it adds.
        routed_scale: with `model`: factor on what the routed experts add. At one half each, as by default, experts
            that equal the shared one give back the dense model.
        neurons: this share of the neurons, those that differ least between the experts, become one shared expert, the
            average of theirs; the rest stays routed.
        score: with `neurons`: what differing means. `activation`: in what a neuron adds to text of an expert's domain
            (`router.data`) when the average takes its place; `weight`: in its weights.
    """

    model: str | None = Field(default=None, min_length=1)
    residual_scale: float = Field(default=0.5, allow_inf_nan=False)
    routed_scale: float = Field(default=0.5, allow_inf_nan=False)
    neurons: float | None = Field(default=None, gt=0, lt=1)
    score: Literal["activation", "weight"] = "activation"

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = self.model_fields_set
        if (self.model is None) == (self.neurons is None):
            raise ValueError("give either `model` (a whole model's networks) or `neurons` (the share of them)")
        if self.model is None and (stray := given & {"residual_scale", "routed_scale"}):
            raise ValueError(f"{', '.join(sorted(stray))}: only with `model`; shared neurons are added as they are")
        if self.neurons is None and "score" in given:
            raise ValueError("score: only with `neurons`; a whole model is shared with all its neurons")
        return self


class SlimConfig(Strict):
    """Experts with fewer neurons.

    Attributes:
        keep: share of every expert's routed neurons that stay: those that add most to text of its own domain.
        refit: the output matrix of what stays is solved for, by least squares, so that it adds what all of it added.
        ridge: penalty of that, relative to the mean square of an activation; it draws towards the matrix as it was.
    """

    keep: float = Field(gt=0, lt=1)
    refit: bool = True
    ridge: float = Field(default=1e-2, gt=0, allow_inf_nan=False)


def size_problems(shared: SharedConfig | None, slim: SlimConfig | None, *, has_text: bool, extends: bool) -> list[str]:
    """What is wrong with them in a recipe with or without text of every domain."""
    problems: list[str] = []
    if extends and (shared or slim):
        problems.append("shared, slim: extend keeps the experts of the MoE that it extends; build anew from all models")
    if not has_text and shared and shared.neurons is not None and shared.score == "activation":
        problems.append(
            "shared.score: activation needs text of every expert's domain (router.data); give it, or score by weight"
        )
    if not has_text and slim:
        problems.append("slim: needs text of every expert's domain (router.data)")
    return problems
