"""Secrets are found; ordinary text of models is not taken for one. The samples are put together here, none is real."""

import json
import struct
from pathlib import Path

import pytest

from solera.leaks import scan_bytes, scan_file

SECRETS = {
    "Hugging Face token": "hf_" + "Ab3" * 11 + "x",
    "AWS access key": "AKIA" + "Q2" * 8,
    "AWS secret key": "aws_secret_access_key = " + "aB/+" * 10,
    "private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "GitHub token": "ghp_" + "a1" * 18,
    "API key": "sk-" + "proj-" + "x1" * 20,
    "password in a URL": "https://me:" + "hunter22@example.org/x",
    "home directory": "/home" + "/somebody/data",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_found_with_its_line(kind: str) -> None:
    found = scan_bytes(f"first\nsecond {SECRETS[kind]} third\n".encode(), "notes.json")
    assert [str(leak) for leak in found] == [f"notes.json:2: {kind}"]
    assert SECRETS[kind] not in str(found[0])


@pytest.mark.parametrize(
    "path", ["/Users" + "/me/x", "C:" + "\\\\Users\\\\me", "/root" + "/models/a", '"/home' + '/me"']
)
def test_home_directories_of_other_systems(path: str) -> None:
    assert scan_bytes(f'{{"a": "{path}"}}'.encode(), "x.json")


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub download",
        "the skill-set of sk-learn",
        "https://huggingface.co/org/name@main",
        "see docs/home/index and ./home/me",
        "AKIA and ASIA are prefixes",
        "models/a, ../data/b, /data/shared/c",
        "blake3:" + "0a" * 32,
    ],
)
def test_ordinary_text_is_not(text: str) -> None:
    assert scan_bytes(text.encode(), "README.md") == []


def test_vocabularies_are_scanned_for_keys_only() -> None:
    assert scan_bytes(SECRETS["home directory"].encode(), "tokenizer.json") == []
    assert scan_bytes(SECRETS["Hugging Face token"].encode(), "tokenizer.json")


def test_metadata_of_weights_is_scanned_and_weights_are_not(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for metadata, weights, expected in (
        ({"format": "pt"}, SECRETS["AWS access key"].encode(), []),
        ({"made_at": SECRETS["home directory"]}, b"\0\0\0\0", ["m:1: home directory"]),
    ):
        header = json.dumps({"__metadata__": metadata}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + weights)
        assert [str(leak) for leak in scan_file(file, "m")] == expected
