"""A merge recipe: mergekit's own YAML language, read strictly.

What mergekit would ignore (a misspelt key, an unknown parameter, a parameter where it has no effect) is an error here.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from solera_core.strict import Strict, did_you_mean
from solera_merge.adapters.settings import COMBINATIONS, METHODS_OF_UPDATES, AdapterSettings
from solera_merge.methods.catalogue import METHODS, Method
from solera_merge.settings import Setting, scalars_of

__all__ = ["MergeConfig", "ModelSource", "OutputSlice", "Parameters", "SliceSource"]

Parameters: TypeAlias = dict[str, Setting]
DType: TypeAlias = Literal["float32", "float16", "bfloat16"]

_LATER = {
    "modules": "merging by module (vision-language, encoder-decoder) is not supported yet",
    "tokenizer": "building a tokenizer is not supported yet; `tokenizer_source` copies that of the base or a model",
    "chat_template": "setting a chat template is not supported yet; the one of the tokenizer that is copied is kept",
}


class ModelSource(Strict):
    """One model of a merge over all layers.

    Attributes:
        model: a directory, `org/name[@revision]`, the name of a stage, or any of them with `+adapter`.
        parameters: of the method, for this model only.
    """

    model: str
    parameters: Parameters = Field(default_factory=dict)


class SliceSource(Strict):
    """Some layers of one model.

    Attributes:
        model: as in `ModelSource`.
        layer_range: [first, end), the end excluded.
        parameters: of the method, for this model in this slice only.
    """

    model: str
    layer_range: tuple[int, int]
    parameters: Parameters = Field(default_factory=dict)

    @field_validator("layer_range")
    @classmethod
    def _not_empty(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"layer_range {list(value)} holds no layer: it is [first, end), and the end is excluded")
        return value


class OutputSlice(Strict):
    """A run of layers of the output, merged from equally many layers of every source.

    Attributes:
        sources: the models and their layers.
        base_model: overrides the global one.
        parameters: of the method, for this slice.
    """

    sources: list[SliceSource] = Field(min_length=1)
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    residual_weight: None = None

    @field_validator("residual_weight", mode="before")
    @classmethod
    def _no_residual(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("mergekit reads `residual_weight` but never uses it; remove it")
        return value


class MergeConfig(Strict):
    """A merge.

    Attributes:
        merge_method: see `docs/merge.md` for the methods and their parameters.
        models: every model over all its layers; or
        slices: runs of layers, stacked in order.
        base_model: the common ancestor; also whose config.json the output gets (else the first model's).
        parameters: of the method, where neither a slice nor a source gives its own.
        dtype: of the output where `out_dtype` is not given. (mergekit also computes in it; here it is float32,
            unless the run is asked for mergekit's own bytes: `Context.compat`.)
        out_dtype: of the output; without either, each tensor keeps the widest dtype of its sources.
        tokenizer_source: whose tokenizer is copied: `base` or one of the models; by default the config's owner.
        adapter: all models are LoRA adapters, and so is the output (`docs/adapters.md`).
    """

    merge_method: str
    models: list[ModelSource] | None = Field(default=None, min_length=1)
    slices: list[OutputSlice] | None = Field(default=None, min_length=1)
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer_source: str | None = None
    adapter: AdapterSettings | None = None
    modules: None = None
    tokenizer: None = None
    chat_template: None = None

    @property
    def method(self) -> Method:
        """The catalogue's entry."""
        return METHODS[self.merge_method]

    @field_validator("merge_method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown method {value!r}{did_you_mean(value, METHODS)}")
        return value

    @field_validator("modules", "tokenizer", "chat_template", mode="before")
    @classmethod
    def _later(cls, value: Any, info: Any) -> Any:
        if value is not None:
            raise ValueError(_LATER[info.field_name])
        return value

    @field_validator("tokenizer_source")
    @classmethod
    def _no_union(cls, value: str | None) -> str | None:
        if value == "union":
            raise ValueError(
                "`union` is not supported yet: it needs every embedding permuted to a new vocabulary; "
                "use `base` or one of the models, whose tokenizers must agree"
            )
        return value

    @model_validator(mode="after")
    def _whole(self) -> "MergeConfig":
        problems: list[str] = []
        if (self.models is None) == (self.slices is None):
            problems.append("give either `models` or `slices`" + (", not both" if self.models else ""))
        if self.tokenizer_source == "base" and self.base_model is None:
            problems.append("tokenizer_source: `base` needs a base_model")
        for where, parameters, per_source in self._levels():
            problems += [f"{where}{problem}" for problem in self._misfits(parameters, per_source=per_source)]
        problems += self._misfits_of_adapters(self.adapter) if self.adapter is not None else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _misfits_of_adapters(self, adapter: AdapterSettings) -> Iterator[str]:
        for name in ("slices", "base_model", "tokenizer_source"):
            if getattr(self, name) is not None:
                yield f"{name}: has no meaning where adapters are merged into an adapter (`adapter:`)"
        if self.merge_method not in METHODS_OF_UPDATES:
            yield (
                f"merge_method: {self.merge_method!r} needs the weights themselves, not only their changes; "
                f"adapters can be merged by {', '.join(METHODS_OF_UPDATES)}"
            )
        elif self.merge_method not in COMBINATIONS and adapter.space == "product" and adapter.keep is None:
            yield f"adapter: the merged update of {self.merge_method} has full rank; give `rank` or `energy`"

    def _levels(self) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
        """(place in the recipe, parameters there, whether the place belongs to one model)."""
        yield "parameters.", self.parameters, False
        for i, model in enumerate(self.models or ()):
            yield f"models.{i}.parameters.", model.parameters, True
        for i, output in enumerate(self.slices or ()):
            yield f"slices.{i}.parameters.", output.parameters, False
            for j, source in enumerate(output.sources):
                yield f"slices.{i}.sources.{j}.parameters.", source.parameters, True

    def _misfits(self, parameters: Mapping[str, Any], *, per_source: bool) -> Iterator[str]:
        known = self.method.parameters
        for name, setting in parameters.items():
            if name not in known:
                yield f"{name}: {self.merge_method} has no such parameter{did_you_mean(name, known)}"
                continue
            if per_source and not known[name].per_model:
                yield f"{name}: is shared by all models of {self.merge_method}; give it under the slice or globally"
            for scalar in scalars_of(setting):
                try:
                    known[name].validate(scalar)
                except ValueError as e:
                    yield f"{name}: {e}"
