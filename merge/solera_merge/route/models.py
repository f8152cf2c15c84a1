"""A route with its models behind it: route, generate, score."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from solera_core.context import Context
from solera_core.data import Document, Text
from solera_core.route import Loader, Route, open_route, request_of

if TYPE_CHECKING:
    from solera_core.likelihood import TextScore

__all__ = ["RoutedModels"]

_BATCH_TOKENS = 4096
T = TypeVar("T")
Given = TypeVar("Given")


class RoutedModels:
    """Several whole models that answer as one: each request by the specialist that the router chooses.

    Example:
        >>> models = RoutedModels.open("out/route")
        >>> models.route(["2 + 2 ="])
        ['math']
        >>> models.generate(["2 + 2 ="], max_new_tokens=4)

    Attributes:
        names: of the specialists.
    """

    def __init__(self, route: Route, load: Loader) -> None:
        self.names = route.names
        self._route, self._load = route, load

    @classmethod
    def open(
        cls,
        directory: str | Path,
        ctx: Context | None = None,
        *,
        places: Mapping[str, str | Path] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        keep: int | None = None,
    ) -> Self:
        """Open a route; its models are loaded when they are first needed.

        Args:
            directory: written by `solera route`.
            ctx: stages, permissions (default: none).
            places: where specialists are now, by name, where they are not found as the route names them.
            dtype: of weights and activations.
            device: as torch calls it.
            keep: so many models stay in memory at a time; None: all that were needed.

        Raises:
            CheckpointError: no route; or a model is gone, or its content is not what the route was fitted to.
            ConfigError: `places` names what is no specialist.
        """
        ctx = ctx or Context()
        route = open_route(Path(directory), ctx, places=places)
        route.require_unchanged()
        return cls(route, Loader(ctx, dtype=dtype, device=device, keep=keep))

    def route(self, texts: Sequence[str | Document]) -> list[str]:
        """The name of the specialist for every text. Of a document the router sees the prompt (`request_of`)."""
        return self._route.assign([t if isinstance(t, str) else request_of(t) for t in texts], self._load)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        batch_tokens: int = _BATCH_TOKENS,
    ) -> list[str]:
        """The greedy continuation of every prompt by its specialist, up to its EOS, a stop string or so many tokens.

        Raises:
            DataError: a prompt that leaves no room in its specialist's context.
        """
        from solera_core.generate import generate

        def answer(model: Any, tokenizer: Any, some: Sequence[str]) -> list[str]:
            return generate(model, tokenizer, some, max_new_tokens=max_new_tokens, stop=stop, batch_tokens=batch_tokens)

        return self._each(prompts, prompts, answer)

    def nll(
        self,
        texts: Sequence[str | Document],
        *,
        specialist: str | None = None,
        window_tokens: int = 1024,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> "list[TextScore]":
        """Negative log-likelihood of every text under its specialist: a sum in nats, over how many tokens and bytes.

        Tokens are the specialist's own: compare models of different tokenizers by the byte.

        Args:
            texts: plain text, or documents, of which only the completion or the assistant's turns are scored.
            specialist: score all of them under this one, whatever the router says.
            window_tokens: longer texts are scored in windows of this many tokens.
            batch_tokens: most tokens, padding included, in one forward pass.

        Raises:
            ConfigError: no specialist of that name.
            DataError: a text without a token to score.
            CheckpointError: a model gives NaN.
        """
        from solera_core.likelihood import score_documents

        documents = [Document(f"{i}", None, Text("", t)) if isinstance(t, str) else t for i, t in enumerate(texts)]

        def score(model: Any, tokenizer: Any, some: Sequence[Document]) -> "list[TextScore]":
            return score_documents(model, tokenizer, some, window_tokens=window_tokens, batch_tokens=batch_tokens)

        if specialist is not None:
            return score(*self._load(self._route.specialist(specialist)), documents)
        return self._each(texts, documents, score)

    def _each(
        self,
        texts: Sequence[str | Document],
        given: Sequence[Given],
        work: Callable[[Any, Any, Sequence[Given]], list[T]],
    ) -> list[T]:
        """`work` on what every specialist is given, back in the order of `given`."""
        names = self.route(texts)
        results: dict[int, T] = {}
        for name in dict.fromkeys(names):
            model, tokenizer = self._load(self._route.specialist(name))
            mine = [i for i, n in enumerate(names) if n == name]
            results |= dict(zip(mine, work(model, tokenizer, [given[i] for i in mine]), strict=True))
        return [results[i] for i in range(len(given))]
