"""The chat template of the output: the models' most common one, a known format by name, or a text of the recipe's.

The formats are those that the model families document. A template is tried before any weight is read, in the sandbox
that transformers renders it in.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError, ConfigError
from solera_core.strict import did_you_mean
from solera_merge.tokenizer.read import SPECIAL_TOKENS, read_json

__all__ = ["MARKS", "TEMPLATES", "check_template", "chosen_template", "template_of"]

_ALPACA: Final = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content | trim + '\\n\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- '### Instruction:\\n' + message.content | trim + '\\n\\n' -}}
    {%- elif message.role == 'user_context' -%}
        {{- '### Input:\\n' + message.content | trim + '\\n\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '### Response:\\n' + message.content | trim + '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('alpaca has the roles system, user, user_context and assistant, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""
_CHATML: Final = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_EXAONE: Final = """\
{%- if messages[0].role != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '[|' + message.role + '|]' + message.content -}}
    {{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""
_LLAMA3: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
_MISTRAL: Final = """\
{{- bos_token -}}
{%- set talk = namespace(system='', turns=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
        {%- set talk.system = message.content + '\\n\\n' -%}
    {%- elif message.role == ('user' if talk.turns % 2 == 0 else 'assistant') -%}
        {%- if message.role == 'user' -%}
            {{- ' [INST] ' + (talk.system if talk.turns == 0 else '') + message.content + ' [/INST]' -}}
        {%- else -%}
            {{- ' ' + message.content + eos_token -}}
        {%- endif -%}
        {%- set talk.turns = talk.turns + 1 -%}
    {%- else -%}
        {{- raise_exception('mistral has turns of user and assistant, behind one system message at most') -}}
    {%- endif -%}
{%- endfor -%}
"""

TEMPLATES: Final[Mapping[str, str]] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Formats by the name that a recipe gives them."""

MARKS: Final[Mapping[str, tuple[str, ...]]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What a format writes between the turns, one token each in models of that family; the last one ends a turn."""

_VARIABLES: Final = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    *SPECIAL_TOKENS,
    "raise_exception",
    "strftime_now",
}
_TALK: Final = (("user", "first words"), ("assistant", "second words"), ("user", "third words"))


def chosen_template(
    wanted: str, checkpoints: Sequence[Checkpoint], known: Collection[str], warnings: list[str]
) -> str | None:
    """The text of the template that a recipe asks for; None where `auto` finds none. Adds to the warnings.

    `auto` is the most common of the models, of equally common ones the first in the recipe. `known` are the variables
    that the output's tokenizer sets besides the usual ones.

    Raises:
        ConfigError: no such name, or a text that is no template.
        CheckpointError: a model's template cannot be read.
    """
    if wanted == "auto":
        found = [text.strip() for c in checkpoints if (text := template_of(c.sidecars)) is not None]
        if not found:
            warnings.append("chat_template: `auto` finds no chat template in any of the models: the output has none")
            return None
        return Counter(found).most_common(1)[0][0]
    if "{" not in wanted:
        if wanted not in TEMPLATES:
            raise ConfigError(
                f"chat_template: {wanted!r} is neither a known format{did_you_mean(wanted, ['auto', *TEMPLATES])} nor "
                "the text of a Jinja template"
            )
        return TEMPLATES[wanted]
    warnings += check_template(wanted, known)
    return wanted


def template_of(sidecars: Sequence[Path]) -> str | None:
    """The chat template of a model, as transformers finds it: a file of its own, else in tokenizer_config.json.

    Raises:
        CheckpointError: the file cannot be read.
    """
    files = {file.name: file for file in sidecars}
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{files['chat_template.jinja']}: cannot be read: {e}") from e
    for name in ("tokenizer_config.json", "chat_template.json"):
        found: Any = read_json(files[name]).get("chat_template") if name in files else None
        if isinstance(found, list):  # several, by name
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def check_template(text: str, known: Collection[str] = ()) -> list[str]:
    """Compile a template as transformers does, and render a short talk with it; returns warnings.

    Raises:
        ConfigError: it does not parse, or it names what nobody sets. (What it refuses by `raise_exception` is its own.)
    """
    from jinja2 import TemplateError, meta, nodes

    environment = _environment()
    try:
        parsed = environment.parse(text)
        template = environment.from_string(text)
    except TemplateError as e:
        line = getattr(e, "lineno", None)
        raise ConfigError(f"chat_template: does not parse{f' (line {line})' if line else ''}: {e}") from e
    guarded = {
        name.name
        for test in parsed.find_all((nodes.Test, nodes.Filter))
        if test.name in ("defined", "undefined", "default", "d")
        for name in test.find_all(nodes.Name)
    }
    usual = _VARIABLES | set(known)
    if unknown := sorted(meta.find_undeclared_variables(parsed) - usual - guarded):
        shown = ", ".join(f"{name!r}{did_you_mean(name, usual)}" for name in unknown[:3])
        raise ConfigError(
            f"chat_template: names {shown}, which nobody sets; guard it with `is defined` if it is optional"
        )
    said: list[str] = []
    failed: list[Exception] = []
    for as_parts in (False, True):  # processors pass the content in parts
        try:
            said.append(template.render(**_conversation(as_parts=as_parts)))
        except _RefusedError:
            return []
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            failed.append(e)
    if not said:
        raise ConfigError(f"chat_template: cannot render a talk of user, assistant and user: {failed[0]}") from failed[
            0
        ]
    if all(any(words not in text for _, words in _TALK) for text in said):
        return ["chat_template: leaves out something that user or assistant said"]
    return []


class _RefusedError(Exception):
    """A template's own `raise_exception`."""


def _conversation(*, as_parts: bool) -> dict[str, Any]:
    messages = [{"role": r, "content": [{"type": "text", "text": t}] if as_parts else t} for r, t in _TALK]
    tokens = {key: f"<{key}>" for key in SPECIAL_TOKENS}
    return {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **tokens}


def _environment() -> Any:
    """As transformers sets it up: its sandbox, loop controls, `generation` blocks and three functions."""
    from datetime import datetime

    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}`: marks what the model writes; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise _RefusedError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
