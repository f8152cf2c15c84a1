"""What the parents' licences mean for the output: reported, never decided.

Five checks: an unknown licence is said to be unknown; non-commercial, share-alike and pass-through parents are named
with what they ask for; no-derivatives stops. Where parents disagree the user says which licence the output bears.
Nothing here is legal advice, and no licence, least of all a permissive one, is ever guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from solera_core.errors import ConfigError, InputError
from solera_core.licence import LICENCES, Licence, asks, family
from solera_core.strict import did_you_mean

__all__ = ["LicenceReport", "check_licence_id", "settle"]


@dataclass(frozen=True)
class LicenceReport:
    """What the card says and what the person publishing should know.

    Attributes:
        id, name, link: of the output; `id` None: the card bears no licence.
        parents: every parent's licence.
        findings: what the parents' licences ask, one sentence each, for whoever reads the card.
        advice: what the person publishing should know besides.
    """

    id: str | None
    name: str | None
    link: str | None
    parents: tuple[Licence, ...]
    findings: tuple[str, ...]
    advice: tuple[str, ...] = ()


def check_licence_id(value: str) -> str:
    """The identifier, if a card may bear it.

    Raises:
        ConfigError: it is none of the hub's identifiers.
    """
    if value not in LICENCES:
        near = did_you_mean(value, LICENCES)
        raise ConfigError(
            f"license: {value!r} is no licence identifier of the hub{near if 'did you mean' in near else ''}; "
            "use `other` for a licence that has none"
        )
    return value


def settle(parents: Sequence[Licence], chosen: str | None, *, repo: str | None) -> LicenceReport:
    """The output's licence, as far as the parents agree on one or the user has chosen, and what was found.

    All parents bear the same one: that one. `chosen` wins, and what speaks against it is said. One that is unknown
    beside others: no licence without a choice.

    Raises:
        InputError: a parent forbids derivatives; or the parents disagree and nothing was chosen.
        ConfigError: `chosen` is no identifier of the hub.
    """
    if chosen is not None:
        check_licence_id(chosen)
    forbidden = [p for p in parents if family(p.id) == "no-derivatives"]
    if forbidden:
        raise InputError(
            f"{forbidden[0].parent}: its licence {forbidden[0].label} (from {forbidden[0].source}) allows no "
            "derivatives, so a model made from it cannot be published; ask its authors, or build without it"
        )
    known = {(p.id, p.name): p for p in parents if p.id is not None}
    unknown = [p for p in parents if p.id is None]
    if chosen is None and len(known) > 1:
        listed = "; ".join(f"{p.parent}: {p.label}" for p in parents)
        raise InputError(
            f"the parents bear different licences ({listed}). Which one the output can bear is for a person to decide: "
            "read them, then pass --license (in a recipe: `license:`)"
        )
    findings = _obligations(list(known.values()))
    advice = [f"The licence of {p.parent} is not known: {p.source}." for p in unknown]
    advice += _names(list(known.values()), repo)
    licence: tuple[str | None, str | None, str | None] = (None, None, None)
    only = next(iter(known.values()), None)
    if chosen is not None:
        advice += _contradictions(chosen, list(known.values()))
        same = next((p for p in known.values() if p.id == chosen), None)
        licence = (chosen, same.name, same.link) if same is not None else (chosen, None, None)
    elif only is not None and not unknown:
        licence = (only.id, only.name, only.link)
        if only.id not in LICENCES:
            advice.append(f"{only.id!r} is no licence identifier of the hub: the card says `other`.")
            licence = ("other", only.name or only.id, only.link)
    elif parents:
        advice.append(
            "The card bears no licence, for not all parents' are known; pass --license once you have read them."
        )
    else:
        advice.append(
            "The card bears no licence, for there are no parents to take one from; pass --license to set one."
        )
    return LicenceReport(*licence, tuple(parents), tuple(findings), tuple(advice))


def _obligations(known: Sequence[Licence]) -> list[str]:
    findings: list[str] = []
    pass_through: set[str] = set()
    for p in known:
        where = f"{p.parent} ({p.label})"
        match family(p.id):
            case "non-commercial":
                findings.append(
                    f"{where} is for non-commercial use: the output must not be labelled as free for commerce."
                )
            case "share-alike":
                findings.append(
                    f"{where} is share-alike: the output bears the same licence, or one it names as compatible."
                )
            case "pass-through" if p.id is not None:
                findings.append(f"{where} asks for: {asks(p.id)}.")
                pass_through.add("llama" if p.id.startswith("llama") else p.id)
            case "unknown":
                findings.append(f"{where} is a licence that this tool does not know: read it.")
            case _:
                pass
    if len(pass_through) > 1:
        findings.append(
            "Parents with terms of two kinds that both have to be passed on: that is for a lawyer, not a tool."
        )
    return findings


def _names(known: Sequence[Licence], repo: str | None) -> list[str]:
    """Llama 3 and later want their name at the head of a derived model's."""
    name = (repo or "").rpartition("/")[2]
    asking = [p.id for p in known if p.id is not None and p.id.startswith("llama") and p.id != "llama2"]
    if not asking or not name or name.lower().startswith("llama"):
        return []
    return [f"The repository's name {name!r} does not begin with `Llama`, which {asking[0]} asks for."]


def _contradictions(chosen: str, known: Sequence[Licence]) -> list[str]:
    findings: list[str] = []
    for p in known:
        if p.id == chosen:
            continue
        kind = family(p.id)
        if kind == "non-commercial" and family(chosen) != "non-commercial":
            findings.append(f"--license {chosen} allows commerce, but {p.parent} ({p.label}) does not: check it.")
        elif kind in ("share-alike", "pass-through"):
            findings.append(
                f"--license {chosen} differs from {p.label} of {p.parent}, which is to be carried on: check it."
            )
        elif kind == "unknown":
            findings.append(f"--license {chosen} beside {p.label} of {p.parent}: check it.")
    return findings
