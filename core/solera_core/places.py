"""Where in a model a tensor lies, by its name alone: which stack, which layer, what kind. No table of models."""

from dataclasses import dataclass

__all__ = ["Place", "place_of"]


@dataclass(frozen=True)
class Place:
    """A tensor's place.

    Attributes:
        stack: what is in front of the layer's number (`model.layers`); empty outside layers.
        layer: the first number in the name; None outside layers.
        kind: what is behind it, without `.weight`, further numbers (of experts, say) as `*`: `mlp.experts.*.up_proj`.
    """

    stack: str
    layer: int | None
    kind: str


def place_of(name: str) -> Place:
    """The place of a tensor.

    Example:
        >>> place_of("model.layers.3.self_attn.q_proj.weight")
        Place(stack='model.layers', layer=3, kind='self_attn.q_proj')
    """
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] == "weight":
        parts = parts[:-1]
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if number is None:
        return Place("", None, ".".join(parts))
    kind = ".".join("*" if part.isdecimal() else part for part in parts[number + 1 :])
    return Place(".".join(parts[:number]), int(parts[number]), kind)
