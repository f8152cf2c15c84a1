"""Building a mixture of four experts with random routers: beside `cp` of what it writes, and mergekit-moe.

The models are Llama-shaped and synthetic (bench/merge.py makes them). As there, a round runs each contestant once and
figures are medians over the rounds.

    python bench/moe_build.py --folder /tmp              1.1B parameters a model: 27 GB of disk
    python bench/moe_build.py --size tiny --rounds 1     to see whether it runs
"""

import argparse
import sys
import tempfile
from pathlib import Path

import yaml

from bench.merge import SIZES, Table, generate, run

EXPERTS = "abcd"


def _tokenizer(directory: Path) -> None:
    """The smallest there is: mergekit-moe will not start without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]
    fast.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="big")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit-moe out")
    parser.add_argument("--folder", type=Path, help="where to put the models (default: the temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="solera-bench-", dir=options.folder) as scratch:
        root = Path(scratch)
        for name, seed in (("base", None), *((name, index) for index, name in enumerate(EXPERTS, 1))):
            generate(root / name, SIZES[options.size], seed)
        _tokenizer(root / "base")
        ours, theirs = root / "moe.yml", root / "mergekit.yml"
        experts = [{"name": name, "model": str(root / name)} for name in EXPERTS]
        ours.write_text(
            yaml.safe_dump({"base_model": str(root / "base"), "experts": experts, "router": {"fit": "random"}})
        )
        sources = [{"source_model": str(root / name), "positive_prompts": [name]} for name in EXPERTS]
        settings = {"base_model": str(root / "base"), "gate_mode": "random", "dtype": "bfloat16", "experts": sources}
        theirs.write_text(yaml.safe_dump(settings))
        python = sys.executable
        build = [python, "-m", "solera", "moe", str(ours), "{out}", "-q"]
        written = root / "written"  # what `cp` copies
        run([part.format(out=written) for part in build])
        contestants = {
            "cp": ["cp", "-r", str(written), "{out}"],
            "cp + sync": ["bash", "-c", f"cp -r {written} {{out}} && sync"],
            "solera": build,
        }
        if not options.no_peer:
            contestants["mergekit-moe"] = [python, "-m", "mergekit.scripts.moe", str(theirs), "{out}", "--quiet"]
        print(f"{'work':<18} {'process':<22} {'wall s':>8} {'ratio':>8} {'CPU s':>8} {'anon MB':>9}")
        Table(root, options.rounds).row(f"4 experts, {options.size}", contestants)


if __name__ == "__main__":
    main()
