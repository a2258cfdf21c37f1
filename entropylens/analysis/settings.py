"""How do runs differ in their settings, and which differ only in a seed?"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any, Final

from entropylens.store.reader import Run

__all__ = ["ABSENT", "Difference", "Group", "differences", "flat_config", "seed_groups"]

_SEEDS: Final = frozenset({"seed", "random_seed", "data_seed", "manual_seed", "torch_seed"})
_PLACES: Final = frozenset(
    {
        *("run_dir", "output_dir", "logging_dir", "log_dir", "save_dir", "default_root_dir"),
        *("checkpoint_dir", "ckpt_dir", "resume_from_checkpoint", "run_id", "run_name", "job_id"),
        *("experiment_name", "exp_name", "hub_model_id", "pid", "host", "hostname", "timestamp"),
        *("local_rank", "rank"),
    }
)
"""Last parts of keys that say where a run is or what it is called, not what it does."""
_TRAINED: Final = ("model", "parameters", "optimizer")
"""What the monitor noted of the training by itself."""
_IN_A_LABEL: Final = 3


class _Absent(Enum):
    ABSENT = "absent"

    def __str__(self) -> str:
        return self.value


ABSENT: Final = _Absent.ABSENT
"""The value of a key that a run lacks; not None, which a run may have."""


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in all runs."""

    key: str
    values: tuple[Any, ...]
    """One a run, in order; `ABSENT` where a run lacks the key."""


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed only."""

    label: str
    members: tuple[int, ...]
    """Places in the runs given."""
    seeds: tuple[Any, ...]
    """One a member; `ABSENT` where it names none."""


def flat_config(run: Run) -> dict[str, Any]:
    """All settings of a run, nested keys joined with dots.

    Args:
        run: The run.

    Returns:
        The monitor's settings, the training's under ``user.``, and ``commit``, ``world_size`` and
        ``versions.`` of the manifest. Lists and empty mappings are values.
    """
    flat = dict(_flat(run.config))
    for key in ("commit", "world_size"):
        flat[key] = run.manifest.get(key)
    return flat | dict(_flat({"versions": run.manifest.get("versions") or {}}))


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Which settings are not the same in all runs?

    ``1`` and ``1.0`` are the same; ``True`` and ``1``, or None and `ABSENT`, are not. Keys that say
    where a run is or what it is called (``output_dir``, ``run_name``, ``host``, ...) are not left
    out, but come last.

    Args:
        runs: The runs.

    Returns:
        The training's own keys first, then the others, then places; by name within each.
    """
    configs = [flat_config(run) for run in runs]
    return [
        Difference(key, tuple(config.get(key, ABSENT) for config in configs))
        for key in sorted(_differing(configs), key=lambda k: (_is_place(k), not _is_user(k), k))
    ]


def seed_groups(runs: Sequence[Run]) -> list[Group]:
    """Which runs are the same experiment with other seeds?

    Those whose settings under ``user`` are equal, but for seeds (a last part ``seed``,
    ``random_seed``, ``data_seed``, ``manual_seed`` or ``torch_seed``) and places, and whose model,
    parameter count and optimiser, as the monitor noted them, are equal too. A run without any
    setting under ``user`` is a group of its own. The commit is not looked at.

    Args:
        runs: The runs.

    Returns:
        Groups in order of their first member. A label has the settings that tell the group from the
        others, at most three unless more are needed; where none does, what its runs' names begin
        with; a number is added to a label that is there already.
    """
    configs = [flat_config(run) for run in runs]
    kinds = [_kind(config) for config in configs]
    says = [any(map(_is_user, config)) for config in configs]
    together: dict[Any, list[int]] = {}
    for place, kind in enumerate(kinds):
        settings = tuple(sorted((key, _text(value)) for key, value in kind.items()))
        together.setdefault(settings if says[place] else place, []).append(place)
    members = list(together.values())
    keys = _telling([kinds[group[0]] for group in members if says[group[0]]])
    labels = [
        _pairs(keys, kinds[group[0]])
        if says[group[0]] and keys
        else _stem([runs[place].name for place in group])
        for group in members
    ]
    seeds = [_seeds([configs[place] for place in group]) for group in members]
    return [
        Group(label, tuple(group), found)
        for label, group, found in zip(_unique(labels), members, seeds, strict=True)
    ]


# -- values --------------------------------------------------------------------------------------


def _flat(config: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_user(key: str) -> bool:
    return key.startswith("user.")


def _is_place(key: str) -> bool:
    return key.rpartition(".")[2] in _PLACES


def _is_seed(key: str) -> bool:
    return _is_user(key) and key.rpartition(".")[2] in _SEEDS


def _text(value: Any) -> str:
    """Equal for equal values only."""
    return (
        str(value) if value is ABSENT else json.dumps(_plain(value), sort_keys=True, default=repr)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    return [k for k in keys if len({_text(config.get(k, ABSENT)) for config in configs}) > 1]


def _kind(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the experiment: neither seed nor place."""
    own = {k: v for k, v in config.items() if _is_user(k) and not _is_seed(k) and not _is_place(k)}
    return own | {key: config[key] for key in _TRAINED if config.get(key) is not None}


def _telling(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that tell the kinds apart, those first that split most; some more up to three."""
    left = sorted(_differing(kinds), key=lambda k: (not _is_user(k), k))
    chosen: list[str] = []
    parts = [""] * len(kinds)
    while left and (len(chosen) < _IN_A_LABEL or len(set(parts)) < len(kinds)):
        tried = {key: _split(parts, kinds, key) for key in left}
        best = max(left, key=lambda key: len(set(tried[key])))
        chosen.append(best)
        parts = tried[best]
        left.remove(best)
    return chosen


def _split(parts: Sequence[str], kinds: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return [f"{p} {_text(k.get(key, ABSENT))}" for p, k in zip(parts, kinds, strict=True)]


def _pairs(keys: Sequence[str], kind: Mapping[str, Any]) -> str:
    lasts = [key.rpartition(".")[2] for key in keys]
    names = [
        last if lasts.count(last) == 1 else key.removeprefix("user.")
        for key, last in zip(keys, lasts, strict=True)
    ]
    return ", ".join(f"{n}={kind.get(k, ABSENT)!s:.40}" for n, k in zip(names, keys, strict=True))


def _stem(names: Sequence[str]) -> str:
    """What names begin with, without a seed's number."""
    low, high = min(names), max(names)
    if low == high:
        return low
    same = next((at for at in range(len(low)) if low[at] != high[at]), len(low))
    stem = re.sub(r"([-_. ]+(seed|run|s))?[-_.= ]*\d*$", "", low[:same])
    return stem or f"{names[0]} and {len(names) - 1} more"


def _seeds(configs: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Of several seeds the first that differs, the least nested before others."""
    keys = {key for config in configs for key in config if _is_seed(key)}
    differing = set(_differing(configs))
    order = sorted(keys, key=lambda k: (k not in differing, k.count("."), k != "user.seed", k))
    return tuple(config.get(order[0], ABSENT) if order else ABSENT for config in configs)


def _unique(labels: Sequence[str]) -> list[str]:
    given: list[str] = []
    for label in labels:
        numbered = (f"{label} ({number})" for number in count(2))
        free = (name for name in numbered if name not in given and name not in labels)
        given.append(next(free) if label in given else label)
    return given
