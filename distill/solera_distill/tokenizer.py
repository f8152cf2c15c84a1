"""Training a byte-level BPE tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from solera_core.data import Document, Text
from solera_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["BOS", "EOS", "save_tokenizer", "train_tokenizer"]

BOS: Final = "<s>"
EOS: Final = "</s>"


def train_tokenizer(
    documents: Iterable[Document],
    *,
    vocab_size: int,
    split_digits: bool,
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    model_max_length: int | None = None,
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer (GPT-2's pre-tokenizer): every text can be written, none needs an unknown token.

    `<s>` (id 0) is put in front of every text; `</s>` (id 1) ends it, where a stage asks for that. The same documents
    give the same tokenizer: merges are chosen by count, then by the pair itself. Text too small or too uniform for
    `vocab_size` gives fewer tokens.

    Raises:
        ConfigError: a special token is given twice, or the vocabulary has no room for them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [BOS, EOS, *special_tokens]
    if len(set(special)) != len(special) or "" in special:
        raise ConfigError(f"tokenizer.special_tokens: each must be new and not empty; given: {list(special_tokens)}")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ConfigError(
            f"tokenizer.vocab_size: {vocab_size} has no room for {len(alphabet)} bytes and {len(special)} specials"
        )
    tokenizer: Any = Tokenizer(models.BPE())
    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_level])
        if split_digits
        else bytes_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator((text for d in documents for text in _texts(d)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped upstream
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(special_tokens) or None,
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    return fast


def _texts(document: Document) -> list[str]:
    if isinstance(document.content, Text):
        return [t for t in (document.content.prompt, document.content.completion) if t]
    return [text for _, text in document.content.turns]


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Write the tokenizer's files."""
    directory.mkdir()
    tokenizer.save_pretrained(directory)
