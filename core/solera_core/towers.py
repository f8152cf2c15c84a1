"""The towers of a model, found from the names of its tensors: a decoder, an encoder, a vision tower, a projector.

No table of architectures. A *stack* is a prefix under which modules are numbered (`model.layers`,
`encoder.block`, `visual.blocks`). A model with one stack is one tower, called `default`. With several, each tower is
the shortest prefix that no other stack shares, or that says in a word what it is (`vision_tower`, `language_model`);
tensors outside every such prefix are towers of their own (`multi_modal_projector`, `shared`), and the output head
belongs to the input embedding's tower. The same tower is called differently in different layouts; without the prefix
that all its tensors share, its names are the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from solera_core.architecture import is_embedding, is_head, text_config

__all__ = [
    "WHOLE",
    "Tower",
    "count_keys",
    "find_tower",
    "layer_count",
    "stacks_of",
    "tower_config",
    "towers_of",
]

WHOLE: Final = "default"
"""Name of the only tower of a model with one stack of layers (or none)."""

# What a module's name says about it; the first that matches. Names outside of these are roles of their own.
_ROLES: Final = (
    ("projector", re.compile(r"project|merger|connector|resampler|qformer|perceiver|aligner|abstractor|^mlp1$")),
    ("vision", re.compile(r"vision|visual|image|video|^vit$")),
    ("audio", re.compile(r"audio|speech|sound")),
    ("language", re.compile(r"language|text|llm")),
    ("mtp", re.compile(r"^mtp")),
)
_SENSES: Final = ("vision", "audio")
_COUNT: Final = re.compile(r"(num_|n_)?((?P<part>encoder|decoder|hidden|text|vision|audio)_)?(layers?|blocks?)|depth")


@dataclass(frozen=True)
class Tower:
    """A part of a model.

    Attributes:
        name: as a recipe calls it.
        role: `language`, `vision`, `audio`, `projector`, `mtp`; else its name.
        tensors: in the order of the model.
        stacks: prefix of its layers -> their number; usually one.
    """

    name: str
    role: str
    tensors: tuple[str, ...]
    stacks: Mapping[str, int]

    @cached_property
    def prefix(self) -> tuple[str, ...]:
        """The modules that all its tensors lie in, the head apart."""
        parents = [tuple(stack.split(".")[:-1]) for stack in self.stacks]
        inside = tuple(f"{stack}." for stack in self.stacks)
        parents += [
            tuple(name.split(".")[:-1]) for name in self.tensors if not name.startswith(inside) and not is_head(name)
        ]
        shared: list[str] = []
        for level in zip(*parents, strict=False):
            if len(set(level)) > 1:
                break
            shared.append(level[0])
        return tuple(shared)

    def canonical(self, name: str) -> str:
        """A tensor's name without the prefix: equal in every layout. Of a head its last two parts."""
        parts = name.split(".")
        return ".".join(parts[-2:] if is_head(name) else parts[len(self.prefix) :])

    def named(self, canonical: str) -> str:
        """A canonical name in this tower's own layout."""
        if is_head(canonical):
            return next((n for n in self.tensors if is_head(n) and n.endswith(f".{canonical}")), canonical)
        return ".".join((*self.prefix, canonical))


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Prefix -> number of modules (the highest number + 1) for everything that is numbered, outermost only.

    Plain sequences of a layer each (`merger.mlp.0.weight`, `merger.mlp.2.weight`) are none: a layer has modules inside.

    Example:
        >>> stacks_of(["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "merger.0.weight"])
        {'model.layers': 2}
    """
    numbers: dict[str, set[int]] = {}
    deep: set[str] = set()
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if i and part.isdigit()), None)
        if at is not None:
            stack = ".".join(parts[:at])
            numbers.setdefault(stack, set()).add(int(parts[at]))
            if len(parts) > at + 2:
                deep.add(stack)
    return {stack: max(found) + 1 for stack, found in numbers.items() if stack in deep}


def towers_of(names: Iterable[str]) -> tuple[Tower, ...]:
    """The towers of a model, in the order of their first tensors; every tensor belongs to exactly one."""
    names = list(names)
    stacks = stacks_of(names)
    if len(stacks) < 2:
        return (Tower(WHOLE, "language", tuple(names), stacks),)
    paths = {stack: tuple(stack.split(".")[:-1]) for stack in stacks}
    prefixes = {_prefix_of(stack, paths) for stack in stacks}
    places = {name: _place(name, prefixes) for name in names}
    embedding = next((places[name] for name in names if is_embedding(name)), None)
    for name in names:
        if is_head(name) and embedding is not None:
            places[name] = embedding
    members: dict[tuple[str, ...], list[str]] = {}
    for name, place in places.items():
        members.setdefault(place, []).append(name)
    called = _names(list(members))
    roles = {place: _role(place, called[place], place == embedding) for place in members}
    towers: list[Tower] = []
    for place, tensors in members.items():
        mine = {stack: n for stack, n in stacks.items() if tensors and _place(f"{stack}.0.", prefixes) == place}
        towers.append(Tower(called[place], roles[place], tuple(tensors), mine))
    return tuple(towers)


def find_tower(towers: Sequence[Tower], name: str) -> Tower | None:
    """The tower of that name; or the only one (the only one with layers) with the role that the name tells.

    So mergekit's `text_decoder` finds the language tower, `vision_tower` finds `visual`, whatever they are called.
    """
    for tower in towers:
        if tower.name == name:
            return tower
    role = _word(name)
    if role is None:
        return None
    found = [tower for tower in towers if tower.role == role]
    layered = [tower for tower in found if tower.stacks]
    return layered[0] if len(layered) == 1 else found[0] if len(found) == 1 else None


def tower_config(config: Mapping[str, Any], tower: Tower) -> Mapping[str, Any]:
    """The level of config.json that describes a tower: the nested one of its role or name, else the outer one."""
    if tower.role == "language":
        return text_config(config)
    for key, value in config.items():
        if isinstance(value, Mapping) and (key == tower.name or (_word(key) == tower.role and key.endswith("config"))):
            return value
    return config


def count_keys(level: Mapping[str, Any], tower: Tower) -> list[str]:
    """The keys of a config level that say how many layers the tower has; `decoder_layers` is about a decoder only."""
    found: list[tuple[str, str | None]] = []
    for key, value in level.items():
        match = _COUNT.fullmatch(key)
        if match is not None and isinstance(value, int) and not isinstance(value, bool):
            found.append((key, match["part"]))
    decoder = [key for key, part in found if part == "decoder"]
    others = [key for key, part in found if part != "decoder"]
    if tower.name == "decoder":
        return decoder or ([] if any(part == "encoder" for _, part in found) else others)
    return others or ([] if tower.name == "encoder" else decoder)


def layer_count(config: Mapping[str, Any], tower: Tower) -> int | None:
    """Number of layers of a tower by the config; None where it does not say."""
    level = tower_config(config, tower)
    return next((int(level[key]) for key in count_keys(level, tower)), None)


def _word(name: str) -> str | None:
    return next((role for role, word in _ROLES if word.search(name)), None)


def _prefix_of(stack: str, paths: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    path = paths[stack]
    for end in range(1, len(path) + 1):
        alone = not any(other != stack and theirs[:end] == path[:end] for other, theirs in paths.items())
        if alone or _word(path[end - 1]) is not None:
            return path[:end]
    return path


def _place(name: str, prefixes: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Prefix of the tower of a tensor: the longest that fits, else the first modules that lead to no other tower."""
    parts = tuple(name.split("."))
    fitting = max((p for p in prefixes if p == parts[: len(p)]), key=len, default=())
    if fitting or () in prefixes:
        rest = parts[len(fitting) : len(fitting) + 1]
        if fitting and _word(fitting[-1]) in _SENSES and rest and _word(rest[0]) == "projector":
            return (*fitting, "multi_modal_projector")  # what a projector is called where it lies beside the tower
        return fitting
    for end in range(1, len(parts)):
        if not any(p[:end] == parts[:end] for p in prefixes):
            return parts[:end]
    return parts


def _names(places: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Short names: without the outermost `model`, a projector's without its tower, where that leaves them different."""
    short = {place: ".".join(place[1:] if len(place) > 1 and place[0] == "model" else place) for place in places}
    short |= {place: place[-1] for place in places if place and place[-1] == "multi_modal_projector"}
    unique = [*short.values()]
    return {place: name if unique.count(name) == 1 and name else ".".join(place) for place, name in short.items()}


def _role(place: tuple[str, ...], name: str, embeds: bool) -> str:
    if name in ("encoder", "decoder", "shared"):
        return name
    word = _word(place[-1]) if place else None
    return word or ("language" if embeds else name)
