"""What a recipe says about the tokenizer of the output: mergekit's `tokenizer` key, read strictly."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from solera_core.strict import Strict
from solera_merge.reference import ModelName

__all__ = ["Fill", "TokenConfig", "TokenizerConfig"]


class Fill(Strict):
    """The embedding of a token for models that do not have it (with `force`: for all).

    Attributes:
        kind: `model`: that model's embedding of the same token; `model_token`: its embedding of another token;
            `zero`: zeros.
        model: whose embedding.
        token: the other token, or
        token_id: the row of it.
    """

    kind: Literal["model", "model_token", "zero"]
    model: ModelName | None = None
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Fill":
        given = (self.token is not None) + (self.token_id is not None)
        if self.kind == "model_token" and (self.model is None or given != 1):
            raise ValueError("kind: model_token needs `model` and either `token` or `token_id`")
        if self.kind == "model" and (self.model is None or given):
            raise ValueError("kind: model needs `model` and nothing else; `kind: model_token` names another token")
        if self.kind == "zero" and (self.model is not None or given):
            raise ValueError("kind: zero takes nothing else")
        return self


class TokenConfig(Strict):
    """One token. One that no tokenizer has is added to the output's.

    Attributes:
        source: a model, or a mapping (`Fill`); needed where some model does not have the token.
        force: the source's embedding replaces those of models that have the token, too.
    """

    source: Fill | None = None
    force: bool = False

    @field_validator("source", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        whole_model = isinstance(value, str) or (isinstance(value, dict) and not value.keys() - {"model", "lora"})
        return {"kind": "model", "model": value} if whole_model else value

    @model_validator(mode="after")
    def _forced(self) -> "TokenConfig":
        if self.force and self.source is None:
            raise ValueError("force: needs a `source`, whose embedding replaces the others")
        return self


class TokenizerConfig(Strict):
    """The tokenizer of the output.

    Attributes:
        source: `union`: the base's and every token that another model has besides; `base`; or any model.
        tokens: embeddings of single tokens.
        pad_to_multiple_of: rows of embedding and head: the number of tokens, rounded up to a multiple of this. By
            default rows without a token stay as they are.
    """

    source: ModelName = "union"
    tokens: dict[str, TokenConfig] = Field(default_factory=dict)
    pad_to_multiple_of: PositiveInt | None = None

    @field_validator("tokens")
    @classmethod
    def _not_empty(cls, value: dict[str, TokenConfig]) -> dict[str, TokenConfig]:
        if "" in value:
            raise ValueError("'' is no token")
        return value
