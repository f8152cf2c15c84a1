"""Licences are reported, never guessed; where the parents disagree a person decides."""

from pathlib import Path

import pytest

from solera.licences import check_licence_id, settle
from solera_core.errors import ConfigError, InputError
from solera_core.licence import LICENCES, Licence, concerns, family, read_front_matter, read_licence


def parents(*ids: str | None) -> list[Licence]:
    return [Licence(f"org/{i}", id_, source="README.md" if id_ else "it has no card") for i, id_ in enumerate(ids)]


def test_parents_that_agree() -> None:
    report = settle(parents("mit", "mit"), None, repo="me/x")
    assert report.id == "mit"
    assert report.findings == ()


def test_parents_that_disagree_need_a_decision() -> None:
    with pytest.raises(InputError, match=r"org/0: apache-2.0; org/1: mit.*--license"):
        settle(parents("apache-2.0", "mit"), None, repo=None)
    assert settle(parents("apache-2.0", "mit"), "apache-2.0", repo=None).id == "apache-2.0"


@pytest.mark.parametrize("known", [(), ("mit",)])
def test_an_unknown_licence_is_never_filled_in(known: tuple[str, ...]) -> None:
    report = settle(parents(*known, None), None, repo=None)
    assert report.id is None
    assert any("is not known: it has no card" in line for line in report.advice)
    assert any("--license" in line for line in report.advice)
    assert not any("--license" in line for line in report.findings), "readers of the card cannot pass it"


def test_no_parents_no_licence() -> None:
    report = settle([], None, repo=None)
    assert report.id is None
    assert "--license" in report.advice[0]
    assert settle([], "mit", repo=None).id == "mit"


@pytest.mark.parametrize("chosen", [None, "mit", "cc-by-nd-4.0"])
@pytest.mark.parametrize("forbidding", ["cc-by-nd-4.0", "cc-by-nc-nd-4.0"])
def test_no_derivatives_stops_whatever_is_chosen(forbidding: str, chosen: str | None) -> None:
    with pytest.raises(InputError, match="allows no derivatives"):
        settle(parents("mit", forbidding), chosen, repo=None)


def test_what_speaks_against_a_choice_is_said() -> None:
    report = settle(parents("cc-by-nc-4.0", "llama3.1", "gpl-3.0"), "apache-2.0", repo="me/blend")
    text = " ".join((*report.findings, *report.advice))
    assert report.id == "apache-2.0"
    assert "non-commercial" in text
    assert "allows commerce, but org/0 (cc-by-nc-4.0) does not" in text
    assert "differs from llama3.1 of org/1" in text
    assert "differs from gpl-3.0 of org/2" in text
    assert "'blend' does not begin with `Llama`" in text


def test_llama_obligations_and_two_kinds_of_terms() -> None:
    report = settle(parents("llama3.2", "llama3.2"), None, repo="me/Llama-mine")
    assert report.id == "llama3.2"
    assert "Built with Llama" in report.findings[0]
    assert not any("does not begin" in line for line in report.advice)
    both = settle(parents("llama3.2", "gemma"), "other", repo="me/Llama-mine")
    assert any("lawyer" in finding for finding in both.findings)


def test_other_carries_its_name_and_link() -> None:
    known = [Licence("org/a", "other", "my-terms", "https://example.org/terms", "README.md")]
    report = settle(known, None, repo=None)
    assert (report.id, report.name, report.link) == ("other", "my-terms", "https://example.org/terms")
    with pytest.raises(InputError, match="different licences"):
        settle([*known, Licence("org/b", "other", "their-terms", None, "README.md")], None, repo=None)


def test_a_licence_the_hub_does_not_know_becomes_other() -> None:
    report = settle(parents("my-own-1.0"), None, repo=None)
    assert (report.id, report.name) == ("other", "my-own-1.0")
    assert any("no licence identifier" in line for line in report.advice)


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("mit", "permissive"),
        ("cc-by-4.0", "permissive"),
        ("cc-by-sa-4.0", "share-alike"),
        ("cc-by-nc-4.0", "non-commercial"),
        ("cc-by-nc-sa-4.0", "non-commercial"),
        ("cc-by-nc-nd-4.0", "no-derivatives"),
        ("cc-by-nd-4.0", "no-derivatives"),
        ("llama3.3", "pass-through"),
        ("gemma", "pass-through"),
        ("bigcode-openrail-m", "pass-through"),
        ("other", "unknown"),
        ("cc", "unknown"),
        (None, "unknown"),
    ],
)
def test_families(identifier: str | None, expected: str) -> None:
    assert family(identifier) == expected


def test_every_identifier_has_a_family_and_few_are_unknown() -> None:
    assert {i for i in LICENCES if family(i) == "unknown"} == {
        "other",
        "unknown",
        "cc",
        "c-uda",
        "apple-ascl",
        "ofl-1.1",
    }


def test_identifiers_are_checked_with_a_suggestion() -> None:
    assert check_licence_id("mit") == "mit"
    with pytest.raises(ConfigError, match=r"did you mean 'llama3\.1'"):
        check_licence_id("llama-3.1")
    with pytest.raises(ConfigError, match="use `other`"):
        check_licence_id("zzzzzz")


def test_reading_a_card(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert read_licence("a", None).id is None
    assert read_licence("a", tmp_path).source == "it has no card"
    card.write_text("---\nlicense: Apache-2.0\ntags: [x]\n---\n# Hello\n")
    assert read_licence("a", tmp_path).id == "apache-2.0"
    card.write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    assert read_licence("a", tmp_path).id is None
    assert "several" in read_licence("a", tmp_path).source
    card.write_text("# Hello\nlicense: mit\n")
    (tmp_path / "LICENSE").write_text("MIT License")
    found = read_licence("a", tmp_path)
    assert found.id is None, "a licence text is not guessed at"
    assert "LICENSE" in found.source


@pytest.mark.parametrize(
    "text", ["", "---\nno end", "---\n- a\n- b\n---\n", "---\na: [\n---\n", "text\n---\na: 1\n---\n"]
)
def test_front_matter_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {}


def test_concerns_before_a_merge() -> None:
    def of(*ids: str | None) -> list[str]:
        return concerns([Licence(f"m{i}", licence) for i, licence in enumerate(ids)])

    assert of("apache-2.0", "mit", None) == []
    assert of("cc-by-nc-4.0", "cc-by-nc-4.0") == []  # all agree
    assert of("apache-2.0", "cc-by-nc-4.0") == [
        "licence of m1: cc-by-nc-4.0 is for non-commercial use, and so is what is merged from it, whatever the other "
        "models allow"
    ]
    assert "allows no derivatives" in of("cc-by-nd-4.0")[0]
    assert of("gemma", "gemma", "apache-2.0") == []
    assert "m0 (gemma), m1 (llama3.1) have terms that each must be passed on" in of("gemma", "llama3.1")[0]
