"""What a server opens while it answers, and what an answer must not tell."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from dashboard_client import Answer

__all__ = ["leaks", "opened"]

_EVENTS = ("open", "os.listdir", "os.scandir")
_CODE = (".py", ".pyc", ".so", ".js", ".json", ".txt", ".zip", "METADATA")
"""Ends of what Python opens for itself, to load a module or to print where something failed."""
_SECRETS = (
    "Traceback",
    "site-packages",
    'File \\"',
    "root:x:0",
    platform.python_version(),
    *(version(package) for package in ("dash", "flask", "werkzeug", "pyarrow")),
)

_heard: list[str] | None = None
_is_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is not None and event in _EVENTS and isinstance(arguments[0], str | bytes | Path):
        _heard.append(os.fsdecode(arguments[0]))


@contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """Paths outside of the folder that are opened or listed, by Python or by pyarrow."""
    global _heard, _is_hooked
    if not _is_hooked:  # cannot be taken out again
        sys.addaudithook(_hook)
        _is_hooked = True
    heard: list[str] = []
    strange: list[str] = []
    plain = {name: getattr(pq, name) for name in ("ParquetFile", "read_metadata", "read_table")}
    for name, call in plain.items():
        setattr(pq, name, _noted(call, heard))
    _heard = heard
    try:
        yield strange
    finally:
        _heard = None
        for name, call in plain.items():
            setattr(pq, name, call)
        found = (path for path in map(os.path.realpath, heard) if not _is_code(path))
        strange += [path for path in found if not Path(path).is_relative_to(folder.resolve())]


def _is_code(path: str) -> bool:
    """Whether Python, a package of ours, or a clock opens it for itself."""
    homes = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])]
    is_ours = path.startswith(tuple(os.path.realpath(home) for home in homes))
    is_module = path.endswith(_CODE) or os.path.isdir(path)
    return (is_ours and is_module) or path.startswith("/usr/share/zoneinfo/")


def _noted(call: Any, heard: list[str]) -> Any:
    def noting(where: Any, *arguments: Any, **named: Any) -> Any:
        heard.append(os.fspath(where))
        return call(where, *arguments, **named)

    return noting


def leaks(answer: Answer, folder: Path) -> list[str]:
    """What stands in an answer of the machine, the program or its faults."""
    text = answer.text + "".join(f"{k}: {v}\n" for k, v in answer.headers.items())
    return [secret for secret in (*_SECRETS, str(folder.parent)) if secret in text]
