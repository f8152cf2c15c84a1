"""Loading what was written through transformers, in a process of its own beside the work.

Only config.json, the index and the headers matter for whether every name and shape has its place, and those are on the
disk before the first weight is computed. So the import of transformers (seconds) runs while the weights are merged.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from solera_core.errors import VerificationError

__all__ = ["ReloadCheck", "require_exact"]


class ReloadCheck:
    """A running check of one directory. Use it as a context manager: leaving it ends the process.

    Args:
        directory: with config.json, index and shard headers; the weights may still be missing.
        trust_remote_code: Python code of the checkpoint may run.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool) -> None:
        self._directory = directory
        self._trust_remote_code = trust_remote_code
        self._process: subprocess.Popen[str] | None = None
        if "transformers" not in sys.modules:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(directory), str(int(trust_remote_code))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},  # the same packages as here
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            with self._process:  # closes its pipes, also where it has ended and nobody asked for the result
                self._process.kill()

    def result(self) -> dict[str, list[str]]:
        """`{"missing": [], "unexpected": [], "mismatched": []}`; waits for the process.

        Raises:
            VerificationError: a name without its place, or the model cannot be loaded at all.
        """
        if self._process is None:
            report = _load_report(self._directory, self._trust_remote_code)
        else:
            out, errors = self._process.communicate()
            if self._process.returncode != 0:
                raise VerificationError(
                    errors.strip().splitlines()[-1]
                    if errors.strip()
                    else f"{self._directory}: the check through transformers ended with {self._process.returncode}"
                )
            report = json.loads(out.splitlines()[-1])
        require_exact(self._directory, report)
        return report


def require_exact(directory: Path, report: Mapping[str, list[str]]) -> None:
    """Raise VerificationError unless transformers found every tensor it wants, no other, and the right shapes."""
    wrong = [
        f"{kind} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for kind, names in report.items() if names
    ]
    if wrong:
        config: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        raise VerificationError(
            f"{directory}: transformers does not load it exactly: {'; '.join(wrong)}; "
            f"the tensors do not fit model_type {config.get('model_type')!r}"
        )


def _load_report(directory: Path, trust_remote_code: bool) -> dict[str, list[str]]:
    from solera_core.causal_lm import load_report

    return dict(sorted(load_report(directory, trust_remote_code=trust_remote_code).items()))


if __name__ == "__main__":
    try:
        print(json.dumps(_load_report(Path(sys.argv[1]), sys.argv[2] == "1")))  # noqa: T201
    except VerificationError as e:
        sys.exit(str(e).replace("\n", " "))
