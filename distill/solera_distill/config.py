"""The recipes of the three training stages: `tune`, `distill` and `init`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from solera_core.data import DataSource
from solera_core.strict import Strict
from solera_core.tokens import TokenCount

__all__ = [
    "DistillConfig",
    "InitConfig",
    "LayerDrop",
    "Objective",
    "Part",
    "Sources",
    "StudentConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TuneConfig",
]

Part = Literal["ffn", "attention", "norms", "embeddings", "router"]
"""A kind of parameter: feed-forward (experts included), attention, normalisation, embeddings and head, router."""


def _as_sources(value: Any) -> Any:
    """A list of sources out of one source, a list, or a mapping `domain -> source(s)`."""
    if isinstance(value, str | DataSource) or (isinstance(value, Mapping) and "path" in value):
        return [value]
    if not isinstance(value, Mapping):
        return value
    found: list[Any] = []
    for domain, given in value.items():
        for source in given if isinstance(given, list) else [given]:
            plain = {"path": source} if isinstance(source, str) else source
            if isinstance(plain, DataSource):
                plain = plain.model_dump(exclude_unset=True)
            if not isinstance(plain, Mapping):
                raise ValueError(f"{domain}: expected a path or a mapping with `path`, found {source!r}")
            if plain.get("domain", domain) != domain:
                raise ValueError(f"{domain}: its source says domain {plain['domain']!r}; name the domain once")
            found.append({**plain, "domain": domain})
    return found


Sources = Annotated[
    list[DataSource],
    BeforeValidator(
        _as_sources,
        json_schema_input_type=DataSource
        | str
        | list[DataSource | str]
        | dict[str, DataSource | str | list[DataSource | str]],
    ),
]
"""Where text comes from: one source, a list, or a mapping from domain to source(s); a bare string is a path."""


class TrainingConfig(Strict):
    """What both kinds of training share.

    Attributes:
        data: the text to train on.
        tokens: train on this many tokens (inputs without padding), passing over the data as often as that takes.
        sequence_tokens: longest piece of text the model sees at once; longer documents are cut into pieces.
        tokens_per_step: tokens of one optimizer step. Its gradient is the mean over all learned tokens of the step.
        micro_batch_tokens: tokens, padding included, that one forward pass takes at most. It bounds memory and changes
            nothing but rounding (and where the load of experts is counted, with `balance`).
        lr: peak learning rate.
        schedule: how the rate falls after the warm-up, as a function of tokens, down to `final_lr`.
        warmup: share of the tokens over which the rate rises linearly.
        final_lr: rate at the end, as a share of `lr`.
        weight_decay: decoupled (AdamW), on matrices only: not on norms, biases and embeddings.
        betas: of AdamW. The second is 0.95, as usual for language models: the gradient's scale drifts.
        clip: largest norm of the whole gradient.
        precision: of the forward and backward passes. Weights, optimizer and softmax are always float32.
        parts: which parameters train; the others stay as they are, to the bit.
        lr_parts: multipliers of the learning rate, by part.
        save_every: a killed run loses at most this many tokens; the held-out curve has a point at each.
        balance: weight of the load-balancing loss of a mixture of experts, E * sum f_e P_e (arXiv 2101.03961), beside
            the objective; counted over the learned tokens of every micro-batch by itself.
        keep_best: write the model as it was where the loss on `eval_data` (mean over domains) was least: at the start
            or at one of the looks at it.
        patience: end after so many looks at `eval_data` (every `save_every`) without a lower loss.
        eval_data: held-out text; its loss is measured before, at every `save_every` and after.
        dtype: of the written weights (default: the dtype of the checkpoint trained).
    """

    data: Sources
    tokens: TokenCount
    sequence_tokens: TokenCount = Field(default=256, ge=2)
    tokens_per_step: TokenCount = 4096
    micro_batch_tokens: TokenCount = 4096
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_lr: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    precision: Literal["float32", "bfloat16"] = "float32"
    parts: Literal["all"] | list[Part] = "all"
    lr_parts: dict[Part, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict[Part, float])
    save_every: TokenCount = 500_000
    balance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    keep_best: bool = False
    patience: int | None = Field(default=None, ge=1)
    eval_data: Sources | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _sensible(self) -> "TrainingConfig":
        if not self.data or self.eval_data == []:
            raise ValueError("`data` and `eval_data` must name at least one source")
        if self.eval_data is None and (self.keep_best or self.patience is not None):
            raise ValueError("keep_best and patience go by the loss on held-out text; give eval_data")
        if isinstance(self.parts, list):
            if not self.parts:
                raise ValueError("parts: is empty, so nothing would train; name some, or write `all`")
            if idle := sorted(set(self.lr_parts) - set(self.parts)):
                raise ValueError(f"lr_parts: {', '.join(idle)} would not train; add to `parts` or leave out")
        return self


class TuneConfig(TrainingConfig):
    """Supervised fine-tuning of one model.

    Attributes:
        model: the checkpoint to start from.
    """

    model: str


class TeacherConfig(Strict):
    """A model whose distributions the student learns.

    Attributes:
        model: its checkpoint; or a route (the only teacher then), which sends each text to one of its specialists.
        domain: it teaches the text of this domain only (default: all text that no other teacher's domain claims).
    """

    model: str
    domain: str | None = None


class LayerDrop(Strict):
    """Start the student as a copy of a deeper model with layers left out. Give exactly one of the first three.

    Attributes:
        layers: how many layers the student keeps.
        ratio: share of the layers that the student keeps.
        keep: exactly which layers, from 0.
        calibration_tokens: training text on which `layers` and `ratio` choose: at each round the layer goes whose
            absence costs the least loss; first and last layer stay.
    """

    layers: int | None = Field(default=None, ge=1)
    ratio: float | None = Field(default=None, gt=0, lt=1)
    keep: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    calibration_tokens: TokenCount = 8192

    @model_validator(mode="after")
    def _one(self) -> "LayerDrop":
        if sum(x is not None for x in (self.layers, self.ratio, self.keep)) != 1:
            raise ValueError("give exactly one of layers, ratio and keep")
        if self.layers == 1:
            raise ValueError("layers: 1 is too few: first and last layer stay, so at least 2; or use `keep`")
        if self.keep is not None and self.keep != sorted(set(self.keep)):
            raise ValueError(f"keep: layers must be ascending, each once; given: {self.keep}")
        return self


class StudentConfig(Strict):
    """What the student starts as.

    Attributes:
        from_: any checkpoint (written `from` in a recipe): a blend, a MoE to be healed, a base.
        layer_drop: leave out layers of it.
    """

    from_: str = Field(alias="from")
    layer_drop: LayerDrop | None = None


class Objective(Strict):
    """Weights of the loss per token, `kl * T^2 * KL(teacher^(1/T) || student^(1/T)) + ce * CE(text)`.

    Attributes:
        kl: of the forward Kullback-Leibler divergence from the teacher. 0 is the control: the same text, no teacher.
        ce: of the cross-entropy with the text itself.
        temperature: T. For language models 1 is right (scaling laws of distillation, arXiv 2502.08606).
    """

    kl: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    ce: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something(self) -> "Objective":
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0, so there is nothing to learn")
        return self


class DistillConfig(TrainingConfig):
    """Teachers' distributions into a student.

    Attributes:
        teachers: who teaches; with domains, each teaches the text of its own.
        student: what the student starts as.
        objective: what it learns.
    """

    teachers: list[TeacherConfig] = Field(min_length=1)
    student: StudentConfig
    objective: Objective = Objective()

    @field_validator("teachers")
    @classmethod
    def _one_each(cls, teachers: list[TeacherConfig]) -> list[TeacherConfig]:
        domains = [t.domain for t in teachers]
        for domain in dict.fromkeys(domains):
            if domains.count(domain) > 1:
                what = "have no domain" if domain is None else f"teach domain {domain!r}"
                raise ValueError(f"{domains.count(domain)} teachers {what}; each text has one teacher")
        return teachers


class TokenizerConfig(Strict):
    """A byte-level BPE tokenizer, trained on given text, with `<s>` in front of every text and `</s>` after it.

    Attributes:
        data: text to train on.
        vocab_size: number of tokens; 256 of them are the bytes.
        split_digits: every digit is a token of its own, which makes arithmetic learnable.
        special_tokens: further tokens that text can never produce by itself (a chat template's markers).
        chat_template: a jinja template.
    """

    data: Sources
    vocab_size: int = Field(default=1024, ge=258)
    split_digits: bool = True
    special_tokens: list[str] = Field(default_factory=list[str])
    chat_template: str | None = None


class InitConfig(Strict):
    """A randomly initialised model with a tokenizer of its own.

    Attributes:
        architecture: a `model_type` of transformers.
        config: its settings. What the tokenizer decides (vocabulary, special token ids) need not be given.
        tokenizer: how to train the tokenizer.
        dtype: of the written weights.
    """

    architecture: str = "llama"
    config: dict[str, Any] = Field(default_factory=dict[str, Any])
    tokenizer: TokenizerConfig
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
