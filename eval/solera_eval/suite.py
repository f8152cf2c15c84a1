"""A suite as it will be scored: every task with its items read, checked and identified."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from solera_core.data import Document, Text, data_path, read_documents, read_jsonl
from solera_core.errors import ConfigError, DataError
from solera_core.strict import load_yaml, parse
from solera_eval.config import ChoiceTask, GenerateTask, SuiteConfig, TextTask

__all__ = ["ChoiceItem", "GenerateItem", "Item", "LoadedTask", "Suite", "TextItem", "load_suite", "load_suites"]


@dataclass(frozen=True)
class TextItem:
    """One document. `id` pairs runs; it is the document's own id, numbered where the text occurs again."""

    id: str
    document: Document

    @property
    def text(self) -> str:
        """All of it, as leak checks see it."""
        content = self.document.content
        if isinstance(content, Text):
            return content.prompt + content.completion
        return "\n".join(text for _, text in content.turns)


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt (perhaps empty), at least two different continuations, and the index of the right one."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The prompt with the right choice, as leak checks see it."""
        return self.prompt + self.choices[self.answer]


@dataclass(frozen=True)
class GenerateItem:
    """A prompt and the accepted answers."""

    id: str
    prompt: str
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The prompt with the first answer, as leak checks see it."""
        return self.prompt + self.answers[0]


Item = TextItem | ChoiceItem | GenerateItem


@dataclass(frozen=True)
class LoadedTask:
    """A task's settings, its items, and what they were read from (None: a hub dataset)."""

    config: TextTask | ChoiceTask | GenerateTask
    items: tuple[Item, ...]
    path: Path | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.config.name

    def domain(self, item: Item) -> str | None:
        """The item's own domain where the data carry one, else the task's."""
        if isinstance(item, TextItem) and self.config.domain is None:
            return item.document.domain
        return self.config.domain


@dataclass(frozen=True)
class Suite:
    """Tasks to be scored together; equal digests mean equal tasks, settings and items."""

    name: str
    tasks: tuple[LoadedTask, ...]

    @property
    def digest(self) -> str:
        """`sha256:` over every task's settings and every item's content; file names and places do not count."""
        canonical = [
            {
                "task": task.config.model_dump(mode="json", exclude={"data", "limit"}),
                "items": [[item.id, task.domain(item), _content(item)] for item in task.items],
            }
            for task in self.tasks
        ]
        text = json.dumps(canonical, sort_keys=True, ensure_ascii=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def load_suites(suites: Sequence[str | SuiteConfig], *, base_dir: Path) -> Suite:
    """Read suite files and inline suites, and join them into one.

    Raises:
        ConfigError: a suite that does not validate, or two tasks of one name.
        DataError: items that are not what the task needs, naming file and line.
    """
    loaded: list[Suite] = []
    for suite in suites:
        if isinstance(suite, SuiteConfig):
            loaded.append(load_suite(suite, base_dir=base_dir))
        else:
            path = base_dir / Path(suite).expanduser()
            config = parse(SuiteConfig, load_yaml(path), where=str(path))
            loaded.append(load_suite(config, base_dir=path.parent))
    names = [task.name for suite in loaded for task in suite.tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"suites: task given by two suites: {', '.join(repeated)}; rename one of each")
    return Suite("+".join(suite.name for suite in loaded), tuple(task for suite in loaded for task in suite.tasks))


def load_suite(config: SuiteConfig, *, base_dir: Path) -> Suite:
    """Read the items of every task of a suite."""
    tasks: list[LoadedTask] = []
    for task in config.tasks:
        items: list[Item]
        if isinstance(task, TextTask):
            path = data_path(task.data, base_dir)
            documents = read_documents(task.data, base_dir=base_dir)
            items = [TextItem(document.id, document) for document in documents[: task.limit]]
        else:
            path = base_dir / Path(task.data).expanduser()
            read = _choice if isinstance(task, ChoiceTask) else _generate
            rows = list(_rows(path, task.limit))  # all, so that an error in one leaves no file open
            items = [read(row, where) for where, row in rows]
        if not items:
            raise DataError(f"task {task.name!r}: no items in {task.data}")
        tasks.append(LoadedTask(task, tuple(_numbered(items, task.name)), path))
    return Suite(config.suite, tuple(tasks))


def _numbered(items: list[Item], task: str) -> Iterator[Item]:
    """Make ids unique: the second occurrence of one content becomes `id#2`; two contents under one id are an error."""
    seen: dict[str, list[str]] = {}
    for item in items:
        contents = seen.setdefault(item.id, [])
        content = _content(item)
        if contents and contents[0] != content:
            raise DataError(f"task {task!r}: two different items have the id {item.id!r}; ids pair items across runs")
        contents.append(content)
        if len(contents) > 1:
            item = _renamed(item, f"{item.id}#{len(contents)}")
            if seen.setdefault(item.id, [content]) != [content]:
                raise DataError(f"task {task!r}: the id {item.id!r} is taken; ids pair items across runs")
        yield item


def _renamed(item: Item, identity: str) -> Item:
    if isinstance(item, TextItem):
        return TextItem(identity, item.document)
    if isinstance(item, ChoiceItem):
        return ChoiceItem(identity, item.prompt, item.choices, item.answer)
    return GenerateItem(identity, item.prompt, item.answers)


def _content(item: Item) -> str:
    if isinstance(item, TextItem):
        return item.document.id
    if isinstance(item, ChoiceItem):
        return _hash([item.prompt, list(item.choices), item.answer])
    return _hash([item.prompt, list(item.answers)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:16]


def _choice(row: Mapping[str, Any], where: str) -> ChoiceItem:
    prompt = row.get("prompt", "")
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: `prompt` must be a string, found {prompt!r}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: `choices` must be a list of at least two non-empty strings, found {choices!r}")
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: `choices` holds the same text twice, so the item cannot be scored: {choices!r}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: `answer` must be an index from 0 to {len(choices) - 1}, found {answer!r}")
    return ChoiceItem(_identity(row, [prompt, choices, answer], where), prompt, tuple(choices), answer)


def _generate(row: Mapping[str, Any], where: str) -> GenerateItem:
    prompt, answer = row.get("prompt"), row.get("answer")
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f"{where}: `prompt` must be a non-empty string, found {prompt!r}")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise DataError(f"{where}: `answer` must be a non-empty string or a list of them, found {answer!r}")
    return GenerateItem(_identity(row, [prompt, answers], where), prompt, tuple(answers))


def _identity(row: Mapping[str, Any], content: Any, where: str) -> str:
    given = row.get("id")
    if given is None:
        return _hash(content)
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise DataError(f"{where}: `id` must be a non-empty string or an integer, found {given!r}")
    return str(given)


def _rows(path: Path, limit: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: expected a .jsonl file")
    if not path.exists():
        raise DataError(f"{path}: no such file (data paths are relative to the suite file)")
    return islice(read_jsonl(path), limit)
