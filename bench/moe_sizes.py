"""What sharing neurons and slimming experts cost on real text: a table of settings, sizes and held-out losses.

    python bench/moe_sizes.py BASE SPECIALISTS TEXT

SPECIALISTS holds a model a domain, in a directory of the domain's name, and their `average`; TEXT holds
`DOMAIN-calibration.jsonl`. bench/moe.py makes all of it, of the Llama with 260 000 parameters. Printed: parameters in
all and at work on a token, and nats a token of held-out text, every text sent to its own expert.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from solera.stages import parse_settings, run_stage
from solera_core.context import Context

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    **{
        f"shared {share}, {score}": {"shared": {"neurons": share, "score": score}}
        for score in ("activation", "weight")
        for share in (0.25, 0.5, 0.75)
    },
    **{f"slim {keep}": {"slim": {"keep": keep}} for keep in (0.75, 0.5, 0.25)},
    "shared 0.5, slim 0.5": {"shared": {"neurons": 0.5}, "slim": {"keep": 0.5}},
    "shared average": {"shared": {"model": "average"}},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("specialists", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--trunk", default="base")
    parser.add_argument("--domains", nargs="+", default=["code", "math", "plays"])
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args()
    names: list[str] = options.domains
    experts = [{"name": name, "model": str((options.specialists / name).resolve())} for name in names]
    data = {name: str((options.text / f"{name}-calibration.jsonl").resolve()) for name in names}
    print("| setting | parameters | at work | mean | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        average = options.specialists / "average"
        seen: set[str] = set()
        for number, (setting, settings) in enumerate(SETTINGS.items()):
            if options.only not in setting:
                continue
            text = json.dumps(settings).replace('"average"', json.dumps(str(average.resolve())))
            raw = {
                "base_model": str(options.base.resolve()),
                "trunk": options.trunk,
                "experts": experts,
                "router": {"fit": "random", "data": data},
                **json.loads(text),
            }
            out = run_stage("moe", parse_settings("moe", raw, where=setting), Path(scratch) / str(number), Context())
            rows = json.loads((out / "solera.json").read_text(encoding="utf-8"))["checks"]["sizes"]["rows"]
            for row in rows:
                said = str(row["setting"])
                label = {"built": setting, "slim, not refitted": f"{setting}, not refitted"}.get(said, said)
                if row["setting"] == "shared" or label in seen:
                    continue
                seen.add(label)
                losses = row["oracle_routed_nll"]
                cells = [f"{losses['domains'][name]:.3f}" for name in names]
                total, active = row["parameters_total"], row["parameters_active"]
                print(f"| {label} | {total:,} | {active:,} | {losses['mean']:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
