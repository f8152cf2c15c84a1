"""Licences of the parents: reported with where they were read, never decided.

Five checks: an unknown licence is said to be unknown; non-commercial, share-alike and pass-through parents are named
with what they ask for; no-derivatives stops. Where parents disagree the user says which licence the output bears.
Nothing here is legal advice, and no licence, least of all a permissive one, is ever guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from solera_core.errors import ConfigError, InputError
from solera_core.strict import did_you_mean

__all__ = [
    "LICENCES",
    "Family",
    "Licence",
    "LicenceReport",
    "check_licence_id",
    "family",
    "read_front_matter",
    "read_licence",
    "settle",
]

Family = Literal["permissive", "share-alike", "non-commercial", "no-derivatives", "pass-through", "unknown"]

_HUB = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other"""
_FREE = """apache-2.0 mit afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 etalab-2.0 isc ms-pl
odc-by openmdw-1.0 openmdw-1.1 postgresql ncsa unlicense zlib pddl"""
_ALIKE = """cc-by-sa-3.0 cc-by-sa-4.0 cdla-sharing-1.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0
gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 mpl-2.0 odbl osl-3.0 lppl-1.3c lgpl-lr"""
_RESEARCH = "h-research intel-research apple-amlr deepfloyd-if-license fair-noncommercial-research-license"

LICENCES: Final = frozenset(_HUB.split())
"""The identifiers that a card on the hub may bear."""

_PERMISSIVE: Final = frozenset(_FREE.split())
_SHARE_ALIKE: Final = frozenset(_ALIKE.split())
_NON_COMMERCIAL: Final = frozenset(_RESEARCH.split())
_ASKS: Final = {
    "llama2": "its text and the notice file shipped along, and the acceptable use policy",
    "llama3": "`Built with Meta Llama 3` shown, `Llama 3` at the start of the name, its text and the use policy",
    "gemma": "its terms and the prohibited use policy passed on, and modified files marked as such",
    "openrail": "its use restrictions passed on to whoever receives the model",
}
_ASKS_LLAMA: Final = (
    "`Built with Llama` shown, `Llama` at the start of the model's name, its text, notice and use policy"
)


@dataclass(frozen=True)
class Licence:
    """The licence of one parent as it was found.

    Attributes:
        parent: the model.
        id: the identifier on its card; None when none was found.
        name, link: `license_name` and `license_link` of its card.
        source: where it was read, or why it is not known.
    """

    parent: str
    id: str | None
    name: str | None = None
    link: str | None = None
    source: str = ""

    @property
    def label(self) -> str:
        """`apache-2.0`, `other (my-licence)`, `unknown`."""
        if self.id is None:
            return "unknown"
        return f"{self.id} ({self.name})" if self.name else self.id


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


def family(licence: str | None) -> Family:
    """What kind of licence an identifier is; `other`, `cc` and what is not known count as unknown."""
    if licence is None:
        return "unknown"
    if "-nd-" in licence:
        return "no-derivatives"
    if "-nc-" in licence or licence in _NON_COMMERCIAL:
        return "non-commercial"
    if licence in _SHARE_ALIKE:
        return "share-alike"
    if licence in _PERMISSIVE:
        return "permissive"
    if _pass_through(licence) is not None:
        return "pass-through"
    return "unknown"


def _pass_through(licence: str) -> str | None:
    """What a pass-through licence asks of derived models, None for other licences."""
    if licence in _ASKS:
        return _ASKS[licence]
    if licence.startswith("llama"):
        return _ASKS_LLAMA
    if "rail" in licence:
        return _ASKS["openrail"]
    return "its terms passed on" if licence == "grok2-community" else None


def read_front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block at the head of a card; {} when there is none or it is not a mapping."""
    try:
        text = readme.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    except OSError:
        return {}
    if not text.startswith("---"):
        return {}
    _, _, rest = text.partition("\n")
    block, end, _ = rest.partition("\n---")
    if not end:
        return {}
    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def read_licence(parent: str, directory: Path | None) -> Licence:
    """The licence that a parent's card bears.

    Args:
        parent: how the model is called.
        directory: where it is on this machine; None when it is not.
    """
    if directory is None:
        return Licence(parent, None, source="the model is not on this machine, so its card could not be read")
    card = read_front_matter(directory / "README.md")
    found = card.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, str) and found.strip():
        name, link = card.get("license_name"), card.get("license_link")
        return Licence(
            parent,
            found.strip().lower(),
            str(name) if name else None,
            str(link) if link else None,
            "README.md",
        )
    if isinstance(found, list):
        return Licence(
            parent, None, source=f"its card names several ({', '.join(map(str, found))}), without saying which holds"
        )
    texts = sorted(p.name for p in directory.glob("LICEN[SC]E*"))
    if texts:
        return Licence(
            parent, None, source=f"no licence on its card; there is a text, {texts[0]}, to be read by a person"
        )
    why = "its card names none" if (directory / "README.md").exists() else "it has no card"
    return Licence(parent, None, source=why)


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
                findings.append(f"{where} asks for: {_pass_through(p.id)}.")
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
