"""``run.json``: what the run is, written by rank 0 when an attempt starts."""

import json
import math
import platform
import socket
import sys
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from entropylens.errors import EntropyLensError
from entropylens.records import FORMAT_VERSION
from entropylens.store.layout import Layout, read_json, write_atomically

__all__ = ["add_attempt", "load_manifest", "new_manifest", "plain", "save_manifest"]


def new_manifest(name: str, world_size: int, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The manifest of a run that has no attempt yet."""
    return {
        "format_version": FORMAT_VERSION,
        "run_id": uuid.uuid4().hex,
        "name": name,
        "created": _now(),
        "world_size": world_size,
        "host": socket.gethostname(),
        "argv": sys.argv,
        "commit": _commit(),
        "versions": _versions(),
        "config": dict(config or {}),
        "attempts": [],
    }


def add_attempt(manifest: dict[str, Any], start_step: int, world_size: int) -> int:
    """Note that training starts again after ``start_step``; return the attempt's number."""
    attempt = len(manifest["attempts"])
    manifest["attempts"].append(
        {
            "attempt": attempt,
            "start_step": start_step,
            "started": _now(),
            "world_size": world_size,
            "host": socket.gethostname(),
        }
    )
    return attempt


def save_manifest(layout: Layout, manifest: Mapping[str, Any]) -> None:
    """Write ``run.json``; what JSON cannot hold is kept as its repr."""
    text = json.dumps(plain(manifest), indent=1, ensure_ascii=False)
    write_atomically(layout.manifest, text.encode("utf-8", "replace"), sync=True)


def plain(value: Any, *, _above: tuple[int, ...] = ()) -> Any:
    """``value`` as every JSON reader takes it; what JSON cannot hold is its repr.

    Example:
        >>> plain({1: (1.5, float("nan")), "path": {2}})
        {'1': [1.5, 'nan'], 'path': [2]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if id(value) not in _above:
        above = (*_above, id(value))
        if isinstance(value, Mapping):
            return {str(key): plain(item, _above=above) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(item, _above=above) for item in value]
    return repr(value)


def load_manifest(root: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        EntropyLensError: There is none, it is damaged, or its format is newer than we know.
    """
    path = Layout(root).manifest
    try:
        manifest = read_json(path)
        found = int(manifest["format_version"])
        _ = manifest["run_id"], [dict(attempt) for attempt in manifest["attempts"]]
    except (FileNotFoundError, NotADirectoryError):
        raise EntropyLensError(
            f"open_run: expected a run directory with run.json, found none in {root}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise EntropyLensError(
            f"open_run: expected a manifest in {path}, got a damaged one ({error}); its "
            f"metrics/*.parquet can still be read with pyarrow, pandas or DuckDB"
        ) from None
    if found > FORMAT_VERSION:
        raise EntropyLensError(
            f"open_run: expected format version {FORMAT_VERSION} or older, got {found} in {path}; "
            f"upgrade entropylens"
        )
    return manifest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("entropylens", "numpy", "pyarrow", "torch", "transformers", "lightning", "trl"):
        if package in sys.modules or package == "entropylens":
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
    return found


def _commit() -> str | None:
    """The commit that the working directory is at, read without starting git."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        head = folder / ".git" / "HEAD"
        try:
            text = head.read_text().strip()
            if text.startswith("ref: "):
                text = (folder / ".git" / text[5:]).read_text().strip()
        except OSError:
            continue
        return text[:40]
    return None
