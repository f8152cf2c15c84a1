"""Whole models through torch and transformers: load, check, save. For stages that run a model; merging never does.

Both frameworks are imported inside the functions, so that importing this module costs nothing.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from solera_core.checkpoint import read_config
from solera_core.dtypes import SAFETENSORS_NAME
from solera_core.errors import CheckpointError, VerificationError
from solera_core.shards import find_weights, read_headers
from solera_core.sidecars import TOKENIZER_FILES, copy_sidecars, find_sidecars, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ParameterInfo", "load_model", "load_report", "load_tokenizer", "meta_parameters", "save_model"]

_SHARD_SIZE: Final = "5GB"  # transformers 5 alone would write 50GB


def load_model(
    path: Path, *, dtype: str = "float32", trust_remote_code: bool = False, allow_pickle: bool = False
) -> "PreTrainedModel":
    """A causal language model from a directory: on the CPU, in `dtype`, eval mode, the family's default attention.

    Raises:
        CheckpointError: it cannot be loaded, or transformers would invent or drop a tensor.
    """
    import torch
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    read_config(path, trust_remote_code=trust_remote_code)
    find_weights(path, allow_pickle=allow_pickle)
    with _quiet():
        try:
            model, info = loader.from_pretrained(
                path,
                dtype=getattr(torch, _known(dtype)),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
        except MemoryError:
            raise
        except Exception as e:  # whatever a config can provoke: its own strict classes, KeyError, AttributeError, ...
            raise CheckpointError(f"{path}: transformers cannot load it as a causal language model: {e}") from e
    wrong = {kind: names for kind, names in _report(info).items() if names}
    if wrong:
        raise CheckpointError(f"{path}: transformers does not load it exactly: {_shorten(wrong)}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    present = sorted(tokenizer_files(p.name for p in path.iterdir()))
    if not present:
        raise CheckpointError(
            f"{path}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of its base model into the directory"
        )
    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as e:  # tokenizers raises bare Exception for damaged files
            raise CheckpointError(f"{path}: the tokenizer ({', '.join(present)}) cannot be loaded: {e}") from e


def load_report(path: Path, *, trust_remote_code: bool = False) -> dict[str, list[str]]:
    """What transformers says when it loads the directory on the meta device: no weight is read or allocated.

    The class is the causal language model of the config's type, else the first class named in `architectures`.

    Returns:
        `{"missing": [...], "unexpected": [...], "mismatched": [...]}`, sorted.

    Raises:
        VerificationError: it cannot be loaded at all.
    """
    with _quiet():
        try:
            _, info = _auto_class(path, trust_remote_code).from_pretrained(
                path,
                device_map="meta",
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported instead of raised, all at once
                output_loading_info=True,
            )
        except Exception as e:
            raise VerificationError(f"{path}: transformers cannot load what was written: {e}") from e
    return _report(info)


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter as transformers has it in memory.

    Attributes:
        shape: there.
        module: class of the module that holds it: `Linear`, `Conv1D`, `Embedding`, ...
        transposed: fused experts only: stored [experts, in, out], not [experts, out, in].
    """

    shape: tuple[int, ...]
    module: str
    transposed: bool


def meta_parameters(path: Path, *, trust_remote_code: bool = False) -> dict[str, ParameterInfo]:
    """The parameters of the model that the config in `path` describes, on the meta device; tied ones once.

    Raises:
        CheckpointError: transformers does not know the model.
    """
    import torch
    from transformers import AutoConfig

    with _quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
            kind = _auto_class(path, trust_remote_code)
            model: Any = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        except Exception as e:  # whatever a config can provoke
            raise CheckpointError(f"{path}: transformers does not know the model: {e}") from e
    found: dict[str, ParameterInfo] = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        transposed = bool(getattr(module, "is_transposed", False))
        found[name] = ParameterInfo(tuple(parameter.shape), type(module).__name__, transposed)
    return found


def save_model(
    model: "PreTrainedModel", directory: Path, *, like: Path | None, dtype: str, sidecars_from: Path
) -> None:
    """Write a model: config.json, safetensors with the names that belong on disk, sidecars copied byte for byte.

    transformers holds some families under other names in memory than on disk (Mixtral's fused experts); its own
    `save_pretrained` turns them back, and the result is compared with `like`.

    Args:
        model: to be saved; it is not changed.
        directory: a staging directory, which may hold other files.
        like: a checkpoint directory of the same architecture: the names and shapes must be equal, and its config.json
            is kept but for the dtype. None: the config is the model's own.
        dtype: `float32`, `bfloat16`, `float16`: of every floating-point tensor.
        sidecars_from: a checkpoint directory whose tokenizer, templates and generation config are copied.

    Raises:
        CheckpointError: a weight is NaN or infinite, or too large for `dtype`.
        VerificationError: names or shapes differ from `like`.
    """
    import torch

    target = getattr(torch, _known(dtype))
    # A scratch folder inside: transformers also writes files that belong to the sidecars.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".save-") as scratch_name, _quiet():
        scratch = Path(scratch_name)
        _save_pretrained(model, scratch, _cast(model.state_dict(), target))
        written = read_headers(find_weights(scratch, allow_pickle=False))
        config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
        if like is not None:
            expected = read_headers(find_weights(like, allow_pickle=False))
            _compare(
                directory, like, {n: t.shape for n, t in written.items()}, {n: t.shape for n, t in expected.items()}
            )
            config = read_config(like, trust_remote_code=True)
        config.pop("torch_dtype", None)  # the older name of dtype, which would contradict it
        config.pop("_name_or_path", None)
        config["dtype"] = dtype
        # safetensors makes its files readable for their owner alone; they get what any other new file has here.
        mode = (scratch / "config.json").stat().st_mode
        for file in scratch.glob("model*.safetensors*"):
            file.chmod(mode)
            file.rename(directory / file.name)
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    copy_sidecars(find_sidecars(sidecars_from), directory)


def _save_pretrained(model: "PreTrainedModel", directory: Path, state: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    blank: Any = GenerationConfig

    # A generation config may be refused on saving after it was accepted on loading. It is not kept anyway: the source's
    # file is copied byte for byte.
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            model.generation_config = blank()
        model.save_pretrained(directory, state_dict=state, max_shard_size=_SHARD_SIZE)
    except SafetensorError as e:  # it hides the operating system's error; a full disk must stay recognisable
        if (code := re.search(r"os error (\d+)", str(e))) is not None:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from e
        raise
    finally:
        if generation is not None:
            model.generation_config = generation


def _cast(state: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Floating-point tensors in `dtype`, tied ones still tied; NaN, infinity and overflow are refused."""
    import torch

    done: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Any] = {}
    result: dict[str, Any] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in done:
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"tensor {name!r} has values that are NaN or infinite; the training diverged")
            done[key] = tensor.detach().to(dtype)
            if not bool(torch.isfinite(done[key]).all()):
                raise CheckpointError(f"tensor {name!r} has values too large for {dtype}; choose a wider dtype")
        result[name] = done[key]
    return result


def _compare(
    directory: Path, like: Path, written: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    absent, extra = sorted(expected.keys() - written.keys()), sorted(written.keys() - expected.keys())
    shapes = [
        f"{n} {written[n]} (there {expected[n]})"
        for n in sorted(written.keys() & expected.keys())
        if written[n] != expected[n]
    ]
    if absent or extra or shapes:
        raise VerificationError(
            f"{directory}: the saved tensors differ from those of {like}: "
            + _shorten({"absent": absent, "additional": extra, "of another shape": shapes})
        )


def _auto_class(path: Path, trust_remote_code: bool) -> Any:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    names = config.architectures or []
    known = [c for c in (getattr(transformers, name, None) for name in names) if c is not None]
    return known[0] if known and not trust_remote_code else AutoModelForCausalLM


def _report(info: dict[str, Any]) -> dict[str, list[str]]:
    mismatched = [f"{n[0]} {tuple(n[1])} (expected {tuple(n[2])})" for n in info.get("mismatched_keys", ())]
    return {
        "missing": sorted(info.get("missing_keys", ())),
        "unexpected": sorted(info.get("unexpected_keys", ())),
        "mismatched": sorted(mismatched),
    }


def _shorten(lists: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{kind}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for kind, names in lists.items()
        if names
    )


def _known(dtype: str) -> str:
    if dtype not in SAFETENSORS_NAME:
        raise CheckpointError(f"dtype {dtype!r} is not known (known: {', '.join(SAFETENSORS_NAME)})")
    return dtype


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and reports of transformers on the terminal: what they say is returned or raised instead."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
