"""Opening trunk and experts, and everything about them that headers can settle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError
from solera_core.hub import split_adapter
from solera_core.strict import did_you_mean
from solera_merge.moe.altered import altered
from solera_merge.moe.config import ExpertConfig, MoeConfig
from solera_merge.moe.dense import Dense, read_dense
from solera_merge.moe.extend import Old, open_old
from solera_merge.moe.families import PLAIN
from solera_merge.moe.targets.choice import choose
from solera_merge.moe.targets.target import Sizes, Target, Verdict
from solera_merge.moe.vocabulary import compare_tokenizers
from solera_merge.vocabulary import check_tokenizer

__all__ = ["Inputs", "open_inputs"]

_SAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "tie_word_embeddings",
    *(feature for feature in PLAIN if feature != "sliding_window"),
)
"""Must agree between trunk and experts: shapes, and what their layers compute."""

_TRUNKS = ("rope_parameters", "rms_norm_eps", "sliding_window", "eos_token_id")
"""The trunk's is used; an expert that was tuned with another deserves a warning."""


@dataclass(frozen=True)
class Inputs:
    """What the MoE is made of, opened and found to fit together.

    Attributes:
        base: that the experts were tuned from; gives config and tokenizer.
        trunk: gives everything but the experts. Where it is yet to be merged or chosen (`trunk.make_trunk`), the base
            stands in for it: it has the same tensors.
        experts: in the order of the recipe.
        names: of the experts.
        width: of the routed experts: of the widest one, or what `shared` and `slim` leave of it; narrower ones are
            padded with zeros, which changes nothing they compute.
        target: the format that the MoE is written in.
        verdicts: what every engine makes of it there.
        warnings: what a careful person would want to know.
        old: the MoE that is extended, which gives the trunk and the first experts; None: all are specialists.
        shared: width of the shared expert; 0: there is none.
        shared_model: that the shared expert is, where it is a whole model.
        copied: the trunk as an expert, where experts are split; None: the trunk itself.
    """

    base: Dense
    trunk: Dense
    experts: tuple[Dense, ...]
    names: tuple[str, ...]
    width: int
    target: Target
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    old: Old | None = None
    shared: int = 0
    shared_model: Dense | None = None
    copied: Dense | None = None

    def is_old(self, name: str) -> bool:
        """Whether an expert comes from the MoE that is extended."""
        return self.old is not None and name in self.old.names


def open_inputs(config: MoeConfig, ctx: Context) -> Inputs:
    """Open trunk and experts (headers only) and check that they belong together.

    Raises:
        CheckpointError: naming the model and the first field, tensor or token that does not fit.
        ConfigError: two experts lead to the same files.
    """
    old = None if config.extend is None else open_old(config.extend, ctx)
    if old is None:
        assert config.base_model is not None  # the config says so
        base = read_dense("base_model", open_checkpoint(config.base_model, ctx))
    else:
        base = old.trunk
        _check_extension(old, config)
    added = [read_dense(f"expert {e.name!r}", _open_expert(e, ctx)) for e in config.experts]
    given = {expert.name: model for expert, model in zip(config.experts, added, strict=True)}
    trunk = given.get(config.trunk, base) if isinstance(config.trunk, str) else base
    check_tokenizer(base.checkpoint)
    warnings = _check_distinct(config, base, added, ctx)
    if trunk is not base:  # whose tokenizer the MoE gets
        _check_fits(trunk, base)
        warnings += compare_tokenizers(trunk.checkpoint, base.checkpoint, "base")
    for expert, model in zip(config.experts, added, strict=True):
        _check_fits(trunk, model)
        warnings += compare_tokenizers(trunk.checkpoint, model.checkpoint, expert.name)
        warnings += [
            f"expert {expert.name!r}: its {field} is {model.fields[field]!r}, the trunk's {trunk.fields[field]!r} is "
            "used"
            for field in _TRUNKS
            if model.fields[field] != trunk.fields[field]
        ]
    experts = (*(old.experts if old else ()), *added)
    names = (*(old.names if old else ()), *(e.name for e in config.experts))
    shared_model = None
    if config.shared is not None and config.shared.model is not None:
        shared_model = read_dense("shared", open_checkpoint(config.shared.model, ctx))
        _check_fits(trunk, shared_model)
        warnings += compare_tokenizers(trunk.checkpoint, shared_model.checkpoint, "shared")
    width, shared = _widths(config, base, experts, shared_model)
    sizes = Sizes(len(experts), config.top_k, width, shared)
    where = f"trunk: {trunk.config_file}"
    asked = config.target if old is None else old.target.name
    target, doubts = choose(asked, config.engines, trunk.fields, sizes, where=where)
    verdicts = target.verdicts(trunk.fields, sizes)
    return Inputs(
        base, trunk, experts, names, width, target, tuple(verdicts), (*warnings, *doubts), old, shared, shared_model
    )


def _widths(config: MoeConfig, base: Dense, experts: Sequence[Dense], shared_model: Dense | None) -> tuple[int, int]:
    """Width of the routed experts and of the shared one."""
    width, shared = max(expert.width for expert in experts), 0
    if shared_model is not None:
        shared = shared_model.width
    elif config.shared is not None and config.shared.neurons is not None:
        for model in (base, *experts):
            if model.width != experts[0].width:
                raise CheckpointError(
                    f"shared.neurons: {model.name} ({model.config_file}) is {model.width} neurons wide, "
                    f"{experts[0].name} {experts[0].width}; only models of one width have neurons in common. Use "
                    "shared.model, or slim"
                )
        shared = _share_of(width, config.shared.neurons)
        width -= shared
    if config.slim is not None:
        width = _share_of(width, config.slim.keep)
    return width, shared


def _share_of(width: int, share: float) -> int:
    """So many neurons, neither none nor all.

    A multiple of 8, without which transformers' kernels for experts refuse half precision; of wide networks one of 32,
    which quantised formats store; as far as the width itself is one.
    """
    step = math.gcd(width, 32 if width >= 1024 else 8)
    return min(max(round(share * width / step) * step, step), width - step)


def _check_extension(old: Old, config: MoeConfig) -> None:
    names = (*old.names, *(expert.name for expert in config.experts))
    where = f"extend: {old.built.path}"
    if taken := [expert.name for expert in config.experts if expert.name in old.names]:
        raise ConfigError(f"experts: {', '.join(taken)}: {where} has an expert of that name")
    if config.target not in ("auto", old.target.name):
        raise ConfigError(f"target: {config.target} asked, but {where} is a {old.target.name}")
    if config.top_k > len(names):
        raise ConfigError(f"top_k: {config.top_k} experts a token asked, but there are only {len(names)}")
    for name in config.router.data:
        if name not in names:
            raise ConfigError(f"router.data.{name}: no such expert{did_you_mean(name, names)}")
    if all(name in config.router.data for name in names):
        return
    if config.router.fit == "auto":
        raise ConfigError(
            f"router.fit: auto compares on held-out text of every domain, and there is none for "
            f"{', '.join(name for name in names if name not in config.router.data)}; give it, or name a fit "
            f"(the MoE's own was {old.fit})"
        )
    if config.router.temperature == "auto" and config.router.fit != old.fit and config.top_k > 1:
        raise ConfigError(
            f"router.temperature: that of {where} was chosen for fit: {old.fit} and says nothing on fit: "
            f"{config.router.fit}; keep {old.fit}, give a number, or give text of every domain to choose it on"
        )


def _open_expert(expert: ExpertConfig, ctx: Context) -> Checkpoint:
    return altered(
        open_checkpoint(expert.model, ctx),
        residual_scale=expert.residual_scale,
        noise_scale=expert.noise_scale,
        seed=ctx.seed,
        name=expert.name,
    )


def _check_distinct(config: MoeConfig, trunk: Dense, experts: list[Dense], ctx: Context) -> list[str]:
    """Two experts that lead to the same files are an error; one that leads to the trunk's is worth a warning."""

    def place(ref: str, model: Dense) -> tuple[Path, str]:
        adapter = split_adapter(ref, ctx)  # two adapters may share a base, and with it the path
        return model.checkpoint.path.resolve(), adapter[1] if adapter else ""

    seen: dict[tuple[Path, str], str] = {}
    for expert, model in zip(config.experts, experts, strict=True):
        where = place(expert.model, model)
        if where in seen and expert.noise_scale == 0:
            raise ConfigError(
                f"experts: {seen[where]!r} and {expert.name!r} are the same model ({where[0]}); "
                "two equal experts only waste memory"
            )
        seen[where] = expert.name
    same = seen.get(place(config.base_model, trunk)) if config.base_model is not None else None
    return [f"expert {same!r} is the base itself: its feed-forward networks are the untuned ones"] if same else []


def _check_fits(trunk: Dense, expert: Dense) -> None:
    if expert.family != trunk.family:
        raise CheckpointError(
            f"{expert.name}: {expert.config_file}: model_type {expert.family!r}, but the trunk ({trunk.config_file}) "
            f"is {trunk.family!r}; experts and trunk must be fine-tunes of one base"
        )
    for field in _SAME:
        if expert.fields[field] != trunk.fields[field]:
            raise CheckpointError(
                f"{expert.name}: {expert.config_file}: {field} is {expert.fields[field]!r}, but "
                f"{trunk.fields[field]!r} in the trunk ({trunk.config_file}); "
                "experts and trunk must be fine-tunes of one base"
            )
