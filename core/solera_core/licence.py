"""The licence of a model as its card states it, and what kind of licence that is. Nothing is ever guessed.

Nothing here is legal advice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

__all__ = ["LICENCES", "Family", "Licence", "asks", "concerns", "family", "read_front_matter", "read_licence"]

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
    if asks(licence) is not None:
        return "pass-through"
    return "unknown"


def asks(licence: str) -> str | None:
    """What a pass-through licence asks of derived models; None for other licences."""
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


def concerns(parents: Sequence[Licence]) -> list[str]:
    """What a person should know about the parents' licences before merging them, one sentence each."""
    found: list[str] = []
    kinds = {parent.parent: family(parent.id) for parent in parents}
    for parent in parents:
        kind = kinds[parent.parent]
        if kind == "no-derivatives":
            found.append(
                f"licence of {parent.parent}: {parent.label} allows no derivatives; a merge may not be published"
            )
        elif kind == "non-commercial" and any(other != kind for other in kinds.values()):
            found.append(
                f"licence of {parent.parent}: {parent.label} is for non-commercial use, and so is what is merged from "
                "it, whatever the other models allow"
            )
    binding = {p.label: p.parent for p in parents if kinds[p.parent] in ("share-alike", "pass-through")}
    if len(binding) > 1:
        listed = ", ".join(f"{parent} ({label})" for label, parent in binding.items())
        found.append(
            f"licences: {listed} have terms that each must be passed on; whether they go together, ask a lawyer"
        )
    return found
