"""The tokenizer files of the output, and the token ids of config.json and generation_config.json."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from solera_core.architecture import text_config
from solera_core.checkpoint import Checkpoint
from solera_core.sidecars import tokenizer_files
from solera_merge.config import MergeConfig
from solera_merge.problems import some
from solera_merge.tokenizer.align import Alignment
from solera_merge.tokenizer.chat import MARKS, chosen_template, template_of
from solera_merge.tokenizer.models import Tokenizers
from solera_merge.tokenizer.read import ModelTokenizer, read_json, read_tokenizer

__all__ = ["OutputFiles", "files_of", "with_vocabulary"]

_TOKEN_KEY: Final = re.compile(r"_token_(ids?|index)$")
_ENDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_PROCESSOR: Final = re.compile(r"processor_config\.json$|^feature_extractor_config\.json$")
_OTHER_FORMATS: Final = ("merges.txt", "added_tokens.json", "bpe.codes", "target.spm")


@dataclass(frozen=True)
class OutputFiles:
    """What stands beside config and weights.

    Attributes:
        copied: files of the inputs, byte for byte.
        written: content by name.
        warnings: what a careful person would want to know.
    """

    copied: tuple[Path, ...]
    written: Mapping[str, bytes]
    warnings: tuple[str, ...]


def files_of(alignment: Alignment, config: MergeConfig) -> OutputFiles:
    """The donor's files, with what the recipe changes in them.

    Args:
        alignment: of the models.
        config: its `chat_template`; and in a union of tokens each model's end of text ends a generation.

    Raises:
        ConfigError: a chat template that is none.
        CheckpointError: a file of the donor or a template cannot be read.
    """
    warnings: list[str] = []
    chat_template, wanted = config.chat_template, config.wanted_tokenizer
    donor, owner = alignment.models.at(alignment.donor), alignment.models.checkpoints[alignment.models.owner]
    folders = [file for file in donor.sidecars if file.suffix == ".jinja" and file.name != "chat_template.jinja"]
    copied = {file.name: file for file in donor.sidecars if file not in folders}
    written: dict[str, Any] = {}
    if donor is alignment.models.tokenizer and (all_ := alignment.tokenizers) is not None:
        # Only the tokenizer is another's: the processor stays, and how to generate, with the ids of the same tokens.
        copied |= {f.name: f for f in owner.sidecars if _PROCESSOR.search(f.name) and f.name not in copied}
        if "generation_config.json" not in copied and (content := _generation(owner)):
            to = alignment.output if alignment.output is not None else all_.own[alignment.donor]
            own = all_.own[alignment.models.owner]
            moved = {k: _moved(v, own, to) if _TOKEN_KEY.search(k) else v for k, v in content.items()}
            written["generation_config.json"] = moved
    settings = read_json(copied["tokenizer_config.json"]) if "tokenizer_config.json" in copied else {}
    before = json.dumps(settings)
    if (output := alignment.output) is not None:
        written["tokenizer.json"] = output.content
        for name in (*tokenizer_files(copied), *_OTHER_FORMATS):
            copied.pop(name, None)  # they would tell of another vocabulary
        if isinstance(settings.get("added_tokens_decoder"), dict):
            added = sorted(output.added.items(), key=lambda item: output.vocabulary[item[0]])
            settings["added_tokens_decoder"] = {str(output.vocabulary[t]): {"content": t, **s} for t, s in added}
    if chat_template is not None:
        extra = settings.get("extra_special_tokens")
        known = [*settings, *(extra if isinstance(extra, dict) else ())]
        names = [name for name in known if name.endswith("_token")]
        text = chosen_template(chat_template, alignment.models.checkpoints, names, warnings)
        mine = template_of(donor.sidecars)
        if text is not None and (mine is None or mine.strip() != text.strip()):
            written["chat_template.jinja"] = text
            settings.pop("chat_template", None)
            for name in ("chat_template.jinja", "chat_template.json"):
                copied.pop(name, None)
    if json.dumps(settings) != before:
        written["tokenizer_config.json"] = settings
    if wanted is not None and wanted.source == "union" and alignment.tokenizers is not None:
        generation = _all_ends(alignment, alignment.tokenizers, warnings)
        if generation is not None:
            written["generation_config.json"] = generation
    if chat_template is not None and chat_template in MARKS and (output or "tokenizer.json" in copied):
        ends = _ids(written.get("generation_config.json", {}).get("eos_token_id")) or _ends(donor)
        warnings += _odd_marks(chat_template, output or read_tokenizer(donor, {}), ends)
    return OutputFiles(
        (*(file for name, file in copied.items() if name not in written), *folders),
        {name: _encoded(content) for name, content in sorted(written.items())},
        tuple(warnings),
    )


def with_vocabulary(content: dict[str, Any], alignment: Alignment) -> list[str]:
    """Set vocab_size and the token ids of the output's config.json, in place; returns warnings.

    Ids are those of the model whose tokenizer the output has. An id of the config's owner that the other config does
    not state is the id of the same token.
    """
    all_, owner, donor = alignment.tokenizers, alignment.models.owner, alignment.donor
    if all_ is None:
        return []
    levels = _levels(content)
    if alignment.rows is not None:
        for level in [level for level in levels if "vocab_size" in level] or levels[-1:]:
            level["vocab_size"] = alignment.rows
    output = alignment.output if alignment.output is not None else all_.own[donor]
    theirs = _levels(alignment.models.at(donor).config)
    pairs = [(levels[-1], theirs[-1]), *([(levels[0], theirs[0])] if len(levels) > 1 else [])]
    for level, other in pairs if owner != donor else ():
        for key in [k for k in level if _TOKEN_KEY.search(k)]:
            level[key] = other[key] if key in other else _moved(level[key], all_.own[owner], output)
    if owner != donor:
        levels[-1].update({key: theirs[-1][key] for key in _ENDS if key in theirs[-1]})
    return [
        f"config.json: `{key}` is {level[key]}, and the vocabulary has no such row"
        for level in levels
        for key in level
        if alignment.rows is not None and _TOKEN_KEY.search(key) and any(i >= alignment.rows for i in _ids(level[key]))
    ]


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and, where there is one, its text config."""
    inner = text_config(config)
    assert isinstance(inner, dict)
    return [config] if inner is config else [config, inner]


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= 0]


def _moved(value: Any, before: ModelTokenizer, after: ModelTokenizer) -> Any:
    """Ids of the same tokens in another tokenizer; None for one that it does not have."""
    tokens = {i: token for token, i in before.vocabulary.items()}
    if isinstance(value, list):
        return [new for i in value if (new := after.vocabulary.get(tokens.get(i, ""))) is not None]
    return after.vocabulary.get(tokens.get(value, "")) if isinstance(value, int) and value >= 0 else value


def _all_ends(alignment: Alignment, all_: Tokenizers, warnings: list[str]) -> dict[str, Any] | None:
    """generation_config.json in which every model's end of text ends a generation; None where the donor's is enough."""
    output = alignment.output if alignment.output is not None else all_.own[alignment.donor]
    checkpoints = alignment.models.checkpoints
    donor = checkpoints[alignment.donor]
    ends = _ends(donor)
    more: dict[int, str] = {}
    for i, checkpoint in enumerate(checkpoints):
        for end in _moved(_ends(checkpoint), all_.own[i], output):
            if end not in ends:
                more.setdefault(end, alignment.models.ref(i))
    if not more:
        return None
    tokens = {i: token for token, i in output.vocabulary.items()}
    named = ", ".join(f"{tokens[i]!r} of {ref!r}" for i, ref in more.items())
    warnings.append(f"generation_config.json: a generation ends at {named} too (`eos_token_id`)")
    content = _generation(donor)
    if not content:
        content = {key: donor.config[key] for key in _ENDS if donor.config.get(key) is not None}
    return {**content, "eos_token_id": [*ends, *more]}


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    file = next((file for file in checkpoint.sidecars if file.name == "generation_config.json"), None)
    return read_json(file) if file is not None else {}


def _ends(checkpoint: Checkpoint) -> list[int]:
    """Ids that end a generation: generation_config.json's, else config.json's."""
    stated = _generation(checkpoint).get("eos_token_id")
    if stated is None:
        stated = text_config(checkpoint.config).get("eos_token_id", checkpoint.config.get("eos_token_id"))
    return _ids(stated)


def _odd_marks(name: str, output: ModelTokenizer | None, ends: list[int]) -> Iterator[str]:
    """Warnings about marks of a known format that are no tokens of the output, or where a generation does not end."""
    if output is None:
        return
    if lacking := [mark for mark in MARKS[name] if mark not in output.vocabulary]:
        yield (
            f"chat_template: {name} writes {some(lacking)}, which the tokenizer splits like other text; list them "
            "under `tokenizer: {tokens: ...}` if they shall be one token each"
        )
    elif output.vocabulary[MARKS[name][-1]] not in ends:
        yield f"chat_template: a turn of {name} ends with {MARKS[name][-1]!r}, which no `eos_token_id` is"


def _encoded(content: Any) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode()
