"""Start-up: CPU seconds of `solera --help` and of checking a recipe, against `python -c "import torch"`.

Target: under a fifth of `import torch`, aim a tenth. Runs are interleaved; medians and their ratio are printed.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "solera --help": [sys.executable, "-m", "solera", "--help"],
    "check a recipe": [
        sys.executable,
        "-c",
        "from solera.recipe import load_recipe; from pathlib import Path; load_recipe(Path('recipes/stories.yml'))",
    ],
    "import mergekit.scripts.run_yaml": [sys.executable, "-c", "import mergekit.scripts.run_yaml"],
}


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs: int = parser.parse_args().runs
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for command in COMMANDS.values():
        cpu_seconds(command)  # byte code and page cache
    seen: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            seen[name].append(cpu_seconds(command))
    torch = statistics.median(seen["import torch"])
    print(f"{'':<34} CPU s (median of {runs})   / import torch")
    for name, values in seen.items():
        median = statistics.median(values)
        print(f"{name:<34} {median:8.3f} [{min(values):.3f}, {max(values):.3f}]   {median / torch:.2f}")


if __name__ == "__main__":
    main()
