import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import entropylens
from entropylens.store.writer import RunWriter

ROOT = Path(entropylens.__file__).parents[1]
PACKAGES = ("entropylens", "callbacks", "dashboard")
LINT = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"


def python(
    code: str, *, cwd: Path | None = None, path: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path or os.pathsep.join(map(str, [ROOT]))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_importing_entropylens_loads_nothing_heavy() -> None:
    heavy = {"torch", "pyarrow", "lightning", "transformers", "dash", "plotly", "pandas", "duckdb"}
    found = python(f"import sys, entropylens; print(sorted(set(sys.modules) & {heavy!r}))")
    assert (found.stdout, found.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", entropylens.__all__)
def test_every_public_name_resolves_and_is_no_submodule(name: str) -> None:
    assert getattr(entropylens, name) is not None
    assert name in dir(entropylens)
    folder = ROOT / "entropylens"
    assert not (folder / f"{name}.py").exists()
    assert not (folder / name).is_dir()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'entropylens' has no attribute 'Lense'"):
        _ = entropylens.Lense


def test_a_log_is_read_without_torch_and_the_lens_says_what_to_install(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", flush_seconds=0.01).close()
    code = f"""
import sys
sys.modules["torch"] = None
import entropylens as el
print(el.open_run({str(tmp_path / "run")!r}).events().table.num_rows)
try:
    el.Lens
except ImportError as error:
    print(error)
from entropylens import Lens
"""
    found = python(code)
    message = "Lens: expected torch to be installed, got none; pip install 'entropylens[torch]'"
    assert found.stdout == f"2\n{message}\n"
    assert found.stderr.endswith(f"ImportError: {message}\n")


def test_the_import_contracts_hold_and_a_planted_edge_breaks_them(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = os.pathsep.join(str(tmp_path / place) for place in ("", "callbacks", "dashboard"))
    kept = python(LINT, cwd=tmp_path, path=path)
    assert kept.returncode == 0, kept.stdout
    assert "4 kept, 0 broken" in kept.stdout
    with open(tmp_path / "entropylens" / "errors.py", "a") as errors:
        errors.write("\n\ndef sneak() -> None:\n    import torch\n")
    broken = python(LINT, cwd=tmp_path, path=path)
    assert broken.returncode == 1
    assert "What reads a log knows no torch BROKEN" in broken.stdout
    assert "entropylens.store" in broken.stdout
