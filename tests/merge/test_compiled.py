"""Compiled kernels where nothing can be cached: a package of root's, a home that nobody may write."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import os, sys
import numba, numpy  # as root: they may be of root alone
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
from solera_merge.kernels.philox import philox_words
out = numpy.empty(4, numpy.uint32)
philox_words(numpy.uint64(0), numpy.uint64(0), numpy.uint64(0), out)
print(" ".join(f"{w:08x}" for w in out))
"""


def test_without_a_place_for_a_cache() -> None:
    source = Path(__file__).resolve().parents[2] / "merge" / "solera_merge"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / "kernels", root / "solera_merge" / "kernels", ignore=ignored)
        (root / "solera_merge" / "__init__.py").touch()
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        env = os.environ | {"PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        env.pop("NUMBA_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
