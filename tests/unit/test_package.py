"""The package as it is installed: import cost, wheel, layers, doctests, no pickle."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import optimkit

ROOT = Path(__file__).parents[2]
OPTIONAL = ("flax", "orbax", "scipy", "sklearn", "matplotlib")


def run(*code: str, python: str = sys.executable, **kwargs) -> str:
    result = subprocess.run(
        [python, "-W", "error", "-c", "\n".join(code)],
        capture_output=True, text=True, check=False, **kwargs,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_starts_no_backend_and_no_extra() -> None:
    out = run(
        "import sys, json, optimkit",
        "from jax.extend import backend",
        "import jax",
        "calls = []",
        f"loaded = [m for m in {OPTIONAL!r} if m in sys.modules]",
        # Allowed only while no backend is alive; it raises otherwise.
        "jax.config.update('jax_num_cpu_devices', 3)",
        "print(json.dumps([loaded, jax.device_count()]))",
        cwd=ROOT,
    )
    loaded, devices = json.loads(out)
    assert loaded == [], f"import optimkit pulls in {loaded}"
    assert devices == 3


def modules() -> list[str]:
    found = [
        info.name
        for info in pkgutil.walk_packages(optimkit.__path__, "optimkit.")
        if not info.name.endswith("__main__")
    ]
    return ["optimkit", *found]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_readme_quick_start_runs() -> None:
    results = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert results.attempted > 0
    assert results.failed == 0


def test_wheel_imports_alone(tmp_path: Path) -> None:
    """Built from this tree, unpacked elsewhere: it imports, with its types and without tests."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path),
         str(ROOT)], check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "optimkit/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "examples")) or n.endswith(".npz")]
    out = run(
        "import sys",
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})",
        "import optimkit",
        "print(optimkit.__file__, optimkit.__version__)",
        cwd=tmp_path,
    )
    assert str(tmp_path / "site") in out
    assert optimkit.__version__ in out


def test_nothing_is_pickled() -> None:
    for path in (ROOT / "optimkit").rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "allow_pickle=True" not in text, path
        assert "cloudpickle" not in text, path


def test_private_modules_of_jax_stay_private() -> None:
    for folder in ("optimkit", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            private = "jax." + "_src"
            assert private not in path.read_text(), path
