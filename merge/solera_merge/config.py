"""A merge recipe: mergekit's own YAML language, read strictly.

What mergekit would ignore (a misspelt key, an unknown parameter, a parameter where it has no effect) is an error here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from solera_core.strict import Strict, did_you_mean
from solera_merge.adapters.settings import COMBINATIONS, METHODS_OF_UPDATES, AdapterSettings
from solera_merge.methods.catalogue import METHODS, Method
from solera_merge.reference import ModelName
from solera_merge.settings import Setting, scalars_of
from solera_merge.tokenizer.config import TokenizerConfig

__all__ = ["MergeConfig", "ModelSource", "OutputModule", "OutputSlice", "Parameters", "SliceSource"]

Parameters: TypeAlias = dict[str, Setting]
DType: TypeAlias = Literal["float32", "float16", "bfloat16"]


class ModelSource(Strict):
    """One model of a merge over all layers.

    Attributes:
        model: a directory, `org/name[@revision]`, the name of a stage, or any of them with `+adapter`; mergekit's
            mapping `{model: {path, revision}, lora: ...}` is read as such a line.
        parameters: of the method, for this model only.
    """

    model: ModelName
    parameters: Parameters = Field(default_factory=dict)


class SliceSource(Strict):
    """Some layers of one model.

    Attributes:
        model: as in `ModelSource`.
        layer_range: [first, end), the end excluded.
        parameters: of the method, for this model in this slice only.
    """

    model: ModelName
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
    base_model: ModelName | None = None
    parameters: Parameters = Field(default_factory=dict)
    residual_weight: None = None

    @field_validator("residual_weight", mode="before")
    @classmethod
    def _no_residual(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("mergekit reads `residual_weight` but never uses it; remove it")
        return value


class OutputModule(Strict):
    """How one module of the output (a tower, an encoder, a projector) is made.

    Attributes:
        models: every model over all layers of the module; or
        slices: runs of its layers, stacked in order.
        merge_method: overrides the global one.
        base_model: overrides the global one.
        parameters: of the method, for this module.
    """

    models: list[ModelSource] | None = Field(default=None, min_length=1)
    slices: list[OutputSlice] | None = Field(default=None, min_length=1)
    merge_method: str | None = None
    base_model: ModelName | None = None
    parameters: Parameters = Field(default_factory=dict)

    @field_validator("merge_method")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else _known_method(value)

    @model_validator(mode="after")
    def _one(self) -> "OutputModule":
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either `models` or `slices`" + (", not both" if self.models else ""))
        return self


class MergeConfig(Strict):
    """A merge.

    Attributes:
        merge_method: see `docs/merge.md` for the methods and their parameters.
        models: every model over all its layers; or
        slices: runs of layers, stacked in order; or
        modules: every module of the models by its name, each made in its own way; or
        towers: some towers of `base_model`, each made in its own way, also from models that are only such a tower (a
            language model for the one inside a vision-language model). All else is copied from `base_model`.
        base_model: the common ancestor; also whose config.json the output gets (else the first model's).
        parameters: of the method, where neither a slice nor a source gives its own.
        dtype: of the output where `out_dtype` is not given. (mergekit also computes in it; here it is float32,
            unless the run is asked for mergekit's own bytes: `Context.compat`.)
        out_dtype: of the output; without either, each tensor keeps the widest dtype of its sources.
        tokenizer_source: the output's tokenizer: `union`, `base` or that of any model, of this merge or not. By default
            it is that of the config's owner, and all models must have its tokens.
        tokenizer: the same with settings of single tokens.
        chat_template: `auto`, a name, or the text of a template (`solera_merge.tokenizer.chat`).
        adapter: all models are LoRA adapters, and so is the output (`docs/adapters.md`).
        tensors: of files of weights, where one lacks a tensor: `intersection` leaves it out, `union` merges it from
            those that have it. By default it is an error.
    """

    merge_method: str
    models: list[ModelSource] | None = Field(default=None, min_length=1)
    slices: list[OutputSlice] | None = Field(default=None, min_length=1)
    modules: dict[str, OutputModule] | None = Field(default=None, min_length=1)
    towers: dict[str, OutputModule] | None = Field(default=None, min_length=1)
    base_model: ModelName | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer_source: ModelName | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    adapter: AdapterSettings | None = None
    tensors: Literal["intersection", "union"] | None = None

    @property
    def method(self) -> Method:
        """The catalogue's entry of the global method."""
        return METHODS[self.merge_method]

    @property
    def wanted_tokenizer(self) -> TokenizerConfig | None:
        """The tokenizer that the recipe asks for, in either way."""
        if self.tokenizer_source is None:
            return self.tokenizer
        return TokenizerConfig(source=self.tokenizer_source)

    @property
    def parts(self) -> dict[str | None, OutputModule]:
        """How each part of the output is made, by module; None: the whole model is one part."""
        named = self.modules or self.towers
        if named is not None:
            return dict(named.items())
        if (self.models is None) == (self.slices is None):
            return {None: OutputModule.model_construct(models=self.models, slices=self.slices)}  # refused elsewhere
        return {None: OutputModule(models=self.models, slices=self.slices)}

    def method_of(self, part: OutputModule) -> Method:
        """The method of a part: its own, else the global one."""
        return METHODS[part.merge_method or self.merge_method]

    @property
    def methods(self) -> list[Method]:
        """Every method that is used."""
        return list(dict.fromkeys(self.method_of(part) for part in self.parts.values()))

    @field_validator("merge_method")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_method(value)

    @model_validator(mode="after")
    def _whole(self) -> "MergeConfig":
        problems: list[str] = []
        given = [key for key in ("models", "slices", "modules", "towers") if getattr(self, key) is not None]
        if len(given) != 1:
            both = f", not {' and '.join(given)}" if given else ""
            problems.append(f"give one of `models`, `slices`, `modules` and `towers`{both}")
        if self.towers is not None and self.base_model is None:
            problems.append("towers: need a base_model (the model whose towers they are, and that all else comes from)")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            problems.append("tokenizer_source: `tokenizer` is given too, and has a `source`; remove one of the two")
        if (wanted := self.wanted_tokenizer) is not None and wanted.source == "base" and self.base_model is None:
            problems.append("tokenizer_source: `base` needs a base_model")
        for where, parameters, per_source, methods in self._levels():
            problems += [f"{where}{problem}" for problem in _misfits(parameters, methods, per_source=per_source)]
        problems += self._misfits_of_adapters(self.adapter) if self.adapter is not None else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _misfits_of_adapters(self, adapter: AdapterSettings) -> Iterator[str]:
        for name in ("slices", "modules", "towers", "base_model", "tokenizer_source", "tokenizer", "chat_template"):
            if getattr(self, name) is not None:
                yield f"{name}: has no meaning where adapters are merged into an adapter (`adapter:`)"
        if self.merge_method not in METHODS_OF_UPDATES:
            yield (
                f"merge_method: {self.merge_method!r} needs the weights themselves, not only their changes; "
                f"adapters can be merged by {', '.join(METHODS_OF_UPDATES)}"
            )
        elif self.merge_method not in COMBINATIONS and adapter.space == "product" and adapter.keep is None:
            yield f"adapter: the merged update of {self.merge_method} has full rank; give `rank` or `energy`"

    def _levels(self) -> Iterator[tuple[str, Mapping[str, Any], bool, list[Method]]]:
        """(place in the recipe, parameters there, whether the place belongs to one model, methods they are for)."""
        yield "parameters.", self.parameters, False, self.methods
        key = "modules" if self.modules is not None else "towers"
        for name, part in self.parts.items():
            where = "" if name is None else f"{key}.{name}."
            methods = [self.method_of(part)]
            yield f"{where}parameters.", part.parameters, False, methods
            for i, model in enumerate(part.models or ()):
                yield f"{where}models.{i}.parameters.", model.parameters, True, methods
            for i, output in enumerate(part.slices or ()):
                yield f"{where}slices.{i}.parameters.", output.parameters, False, methods
                for j, source in enumerate(output.sources):
                    yield f"{where}slices.{i}.sources.{j}.parameters.", source.parameters, True, methods


def _known_method(value: str) -> str:
    if value not in METHODS:
        raise ValueError(f"unknown method {value!r}{did_you_mean(value, METHODS)}")
    return value


def _misfits(parameters: Mapping[str, Any], methods: Sequence[Method], *, per_source: bool) -> Iterator[str]:
    """What is wrong with the parameters of one level, which is for one method or for several."""
    for name, setting in parameters.items():
        having = [method for method in methods if name in method.parameters]
        if not having:
            called = " and ".join(method.name for method in methods)
            known = {known for method in methods for known in method.parameters}
            yield f"{name}: {called} has no such parameter{did_you_mean(name, known)}"
        for method in having:
            parameter = method.parameters[name]
            if per_source and not parameter.per_model:
                yield f"{name}: is shared by all models of {method.name}; give it under the slice or globally"
            for scalar in scalars_of(setting):
                try:
                    parameter.validate(scalar)
                except ValueError as e:
                    yield f"{name}: {e}"
