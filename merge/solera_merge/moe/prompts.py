"""Routers from a few prompts for each expert: at the site that routers read, and as mergekit-moe makes them.

    E experts, D model width, L layers, N tokens

`prompts` runs every expert's prompts through the trunk with its feed-forward networks, reads what the routers will
read, of all tokens but the first BOS, and solves for the router by ridge regression, as text of the domains would be
(`solera_merge.moe.router`), with a larger penalty, because tokens are few. Negative prompts count as -1 for their
expert. One factor a layer makes the logit of the right expert stand `MARGIN` above the mean of the others, on average
over the prompts' tokens. Tried on a real model (260K parameters, 5 layers, 3 texts, some 350 tokens of prompts each):
of other text's tokens it sent 71 % to the right expert, rows that are plain mean states of length 1 69 %, centred mean
states 54 %; a softmax router has no intercept, which is what those lack.

mergekit-moe's `hidden` reads the residual stream that enters a layer, before attention and norm, at the last token of
each prompt, of the trunk alone in bfloat16, and scales every row to length 1; `hidden_avg` takes the mean of all
positions, padding included; `cheap_embed` the sum of the token embeddings, the same in every layer. They are here for
comparison: in our measurements they were no better than random.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from solera_core.causal_lm import load_tokenizer
from solera_core.context import Context
from solera_core.errors import CheckpointError, DataError
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.fit import load_trunk
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.router import ridge_router
from solera_merge.moe.states import put_ffn, router_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MARGIN", "PROMPT_FITS", "prompt_routers", "prompt_rows"]

PROMPT_FITS: Final = ("prompts", "mergekit_hidden", "mergekit_hidden_avg", "mergekit_cheap_embed")
"""Fits that are made of prompts."""

MARGIN: Final = 4.0
"""Logits; two experts a token then get about 98 and 2 % on the prompts themselves."""

_RIDGE: Final = 0.1
"""Penalty, relative to the mean diagonal of X'X: a hundred times that of a fit to text."""


def prompt_routers(
    config: MoeConfig, inputs: Inputs, scratch: Path, ctx: Context
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """One (E, D) matrix a layer, at temperature 1, and the facts for solera.json.

    Args:
        config: with `router.fit` one of `PROMPT_FITS`.
        inputs: opened.
        scratch: a directory that does not exist, for a copy of the trunk where one is needed.
        ctx: threads.

    Raises:
        DataError: a prompt without tokens.
        CheckpointError: no tokenizer, or states that are NaN or infinite.
    """
    fit = config.router.fit
    facts: dict[str, Any] = {"fit": fit, "prompts": {expert.name: len(expert.prompts) for expert in config.experts}}
    if fit == "prompts":
        rows, accuracy, tokens = _at_the_site(config, inputs, load_trunk(inputs, scratch, ctx))
        facts |= {"prompt_tokens": tokens, "route_accuracy_on_prompts": accuracy}
    elif fit == "mergekit_cheap_embed":
        rows = _cheap_embed(config, inputs)
    else:
        model = load_trunk(inputs, scratch, ctx, dtype="bfloat16")
        rows = _hidden(config, inputs, model, average=fit == "mergekit_hidden_avg")
    return rows, facts


def prompt_rows(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """Router rows of one layer from the states (N, D) of every expert's prompts, positive and negative.

    Returns:
        (E, D) float64, and per expert the share of its prompts' tokens for which it comes first.
    """
    gram_DD = sum((x_ND.T @ x_ND for x_ND in (*positive, *negative)), start=np.zeros((positive[0].shape[1],) * 2))
    sums_ED = np.stack([x.sum(axis=0) - n.sum(axis=0) for x, n in zip(positive, negative, strict=True)])
    rows_ED = ridge_router(gram_DD, sums_ED, np.array([len(x_ND) for x_ND in positive]), ridge=_RIDGE)
    right: list[float] = []
    margins: list[np.ndarray] = []
    for e, x_ND in enumerate(positive):
        logits_NE = x_ND @ rows_ED.T
        margins.append(logits_NE[:, e] - np.delete(logits_NE, e, axis=1).mean(axis=1))
        right.append(float((logits_NE.argmax(axis=1) == e).mean()))
    margin = float(np.concatenate(margins).mean())
    return rows_ED * (MARGIN / margin if margin > 0 else 1.0), right


def _at_the_site(
    config: MoeConfig, inputs: Inputs, model: "PreTrainedModel"
) -> tuple[list[np.ndarray], dict[str, list[float]], dict[str, int]]:
    tokenizer = load_tokenizer(inputs.trunk.checkpoint.path)
    layers = inputs.trunk.layers
    states: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
    tokens: dict[str, int] = {}
    for expert, dense in zip(config.experts, inputs.experts, strict=True):
        put_ffn(model, dense)
        where = f"experts: {expert.name!r}"
        positive = _states(model, tokenizer, expert.prompts, layers, where)
        negative = _states(model, tokenizer, expert.negative_prompts, layers, where)
        states.append((positive, negative))
        tokens[expert.name] = len(positive[0])
    rows: list[np.ndarray] = []
    accuracy: dict[str, list[float]] = {name: [] for name in inputs.names}
    for layer in range(layers):
        found, right = prompt_rows(
            [positive[layer] for positive, _ in states], [negative[layer] for _, negative in states]
        )
        rows.append(found)
        for name, share in zip(inputs.names, right, strict=True):
            accuracy[name].append(float(f"{share:.5g}"))
    return rows, accuracy, tokens


def _states(
    model: "PreTrainedModel", tokenizer: Any, prompts: Sequence[str], layers: int, where: str
) -> list[np.ndarray]:
    """What each layer's router would read of all prompts' tokens, (N, D) float64."""
    import torch

    found: list[list[np.ndarray]] = [[np.zeros((0, model.config.hidden_size))] for _ in range(layers)]
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        skipped = 1 if ids and ids[0] == tokenizer.bos_token_id else 0  # the same for all, and it says nothing
        if len(ids) <= skipped:
            raise DataError(f"{where}: the prompt {prompt!r} has no tokens")
        with torch.inference_mode(), router_inputs(model, layers) as states:
            model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
        for layer, x_1TD in states.items():
            x_ND = x_1TD[0, skipped:].double().numpy()
            if not np.isfinite(x_ND).all():
                raise CheckpointError(f"{where}: its prompts give states that are NaN or infinite at layer {layer}")
            found[layer].append(x_ND)
    return [np.concatenate(parts) for parts in found]


def _hidden(config: MoeConfig, inputs: Inputs, model: "PreTrainedModel", *, average: bool) -> list[np.ndarray]:
    import torch

    tokenizer = _padding_tokenizer(inputs)

    def vectors(prompts: Sequence[str]) -> np.ndarray:  # (L, D)
        with torch.inference_mode():
            hidden = model(**_batch(tokenizer, prompts), output_hidden_states=True, use_cache=False).hidden_states
        states_LBTD = torch.stack(hidden[:-1]).float()
        states_LBD = states_LBTD.mean(dim=2) if average else states_LBTD[:, :, -1]
        return np.asarray(states_LBD.mean(dim=1).numpy())

    return _rows_of(config, vectors)


def _cheap_embed(config: MoeConfig, inputs: Inputs) -> list[np.ndarray]:
    tokenizer = _padding_tokenizer(inputs)
    embedding_VD = inputs.trunk.checkpoint.read("model.embed_tokens.weight")

    def vectors(prompts: Sequence[str]) -> np.ndarray:
        batch = _batch(tokenizer, prompts)
        ids = batch["input_ids"][batch["attention_mask"].bool()].numpy()
        total_D = embedding_VD[ids].sum(axis=0, dtype=np.float64)
        total_D /= max(float(np.linalg.norm(total_D)), 1e-8)  # before the negative prompts' is taken off
        return np.repeat(total_D[None], inputs.trunk.layers, axis=0)

    return _rows_of(config, vectors)


def _rows_of(config: MoeConfig, vectors: Any) -> list[np.ndarray]:
    rows_ELD: list[np.ndarray] = []
    for expert in config.experts:
        row_LD = vectors(expert.prompts)
        if expert.negative_prompts:
            row_LD = row_LD - vectors(expert.negative_prompts)
        rows_ELD.append(row_LD / np.maximum(np.linalg.norm(row_LD, axis=-1, keepdims=True), 1e-8))
    return list(np.stack(rows_ELD, axis=1))


def _padding_tokenizer(inputs: Inputs) -> Any:
    tokenizer: Any = load_tokenizer(inputs.trunk.checkpoint.path)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    return tokenizer


def _batch(tokenizer: Any, prompts: Sequence[str]) -> Any:
    texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}
