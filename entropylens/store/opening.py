"""Opening a run directory for writing: where, who else, and what an earlier attempt left."""

import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from entropylens.errors import EntropyLensError
from entropylens.store.compact import repair
from entropylens.store.layout import Layout
from entropylens.store.manifest import add_attempt, load_manifest, new_manifest, save_manifest
from entropylens.store.resume import rewind
from entropylens.store.seal import seal_abandoned
from entropylens.store.status import Claim, load_status

__all__ = ["checked_place", "claim_place", "open_manifest"]

log = logging.getLogger("entropylens")

WAIT_SECONDS: Final = 60.0
"""How long a rank waits for rank 0 to open the run."""


def checked_place(run_dir: str | Path) -> Path:
    """The run directory as an absolute path.

    Raises:
        EntropyLensError: It is a file, or on an object store.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(run_dir)):
        raise EntropyLensError(
            f"RunWriter: expected a local run_dir, got {str(run_dir)!r}; object stores have no "
            f"append: write to a disk and copy the directory"
        )
    root = Path(run_dir).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise EntropyLensError(
            f"RunWriter: expected run_dir to be a directory, got the file {root}; choose another"
        )
    return root


def claim_place(root: Path, rank: int, resume_step: int | None) -> tuple[Layout, Claim]:
    """Where to write, and the right to; a run that has ended is left alone unless resumed."""
    layout = Layout(root)
    claim = Claim(layout, rank)
    if rank > 0 or resume_step is not None or not layout.manifest.exists():
        return layout, claim
    claim.release()
    load_manifest(root)
    number = 2
    while True:
        free = root.with_name(f"{root.name}-{number}")
        try:
            os.mkdir(free)
            break
        except FileExistsError:
            number += 1
    log.warning("entropylens: %s holds a run that has ended; writing to %s", root, free)
    return Layout(free), Claim(Layout(free), rank)


def open_manifest(
    layout: Layout,
    rank: int,
    *,
    name: str,
    world_size: int,
    config: Mapping[str, Any] | None,
    start_step: int,
) -> dict[str, Any]:
    """Begin an attempt: what an earlier one left is sealed, what it logged too much makes way.

    Rank 0 writes the manifest, the others wait for it.

    Returns:
        The manifest, whose last attempt is this one.

    Raises:
        EntropyLensError: Rank 0 does not open the run, or its format is newer.
    """
    if rank > 0:
        manifest = _wait_for_rank_zero(layout, start_step)
        if len(manifest["attempts"]) > 1:
            rewind(layout, manifest["run_id"], rank, start_step)
        else:
            seal_abandoned(layout, manifest["run_id"], rank)
        return manifest
    if layout.manifest.exists():
        manifest = load_manifest(layout.root)
        repair(layout, manifest["run_id"])
        rewind(layout, manifest["run_id"], rank, start_step)
        _rewind_gone(layout, manifest["run_id"], world_size, start_step)
        manifest["world_size"], manifest["config"] = world_size, dict(config or {})
    else:
        manifest = new_manifest(name, world_size, config)
        seal_abandoned(layout, manifest["run_id"], rank)
    add_attempt(manifest, start_step, world_size)
    save_manifest(layout, manifest)
    return manifest


def _rewind_gone(layout: Layout, run_id: str, world_size: int, step: int) -> None:
    """Rewind ranks that the run no longer has; one that is alive rewinds itself."""
    for rank in layout.ranks():
        if rank >= world_size:
            with suppress(EntropyLensError):
                claim = Claim(layout, rank)
                rewind(layout, run_id, rank, step)
                claim.release()


def _wait_for_rank_zero(layout: Layout, start_step: int) -> dict[str, Any]:
    deadline, before = time.monotonic() + WAIT_SECONDS, load_status(layout.status(0))
    while time.monotonic() < deadline:
        status = load_status(layout.status(0))
        is_new = status is not None and (before is None or status.attempt > before.attempt)
        if status is not None and (is_new or status.seen_state() == "running"):
            manifest = load_manifest(layout.root)
            newest = manifest["attempts"][-1]
            if newest["start_step"] == start_step and newest["attempt"] == status.attempt:
                return manifest
        time.sleep(0.05)
    raise EntropyLensError(
        f"RunWriter: expected rank 0 to open {layout.root} within {WAIT_SECONDS:.0f} s, but it did "
        f"not; give all ranks the same new run_dir"
    )
