"""See that a training run is about to fail, why, and what would have kept it alive.

``import entropylens as el`` loads neither torch nor pyarrow: each name below is imported when it
is first used, so that reading a log on a laptop and asking for ``--help`` stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropylens.capture.insides import ProbeSet as ProbeSet
    from entropylens.control.step_bound import StepBound as StepBound
    from entropylens.errors import EntropyLensError as EntropyLensError
    from entropylens.fine_tuning import Selection as Selection
    from entropylens.fine_tuning import select_tensors as select_tensors
    from entropylens.lens import Lens as Lens
    from entropylens.registry import Diagnostic as Diagnostic
    from entropylens.registry import all_diagnostics as all_diagnostics
    from entropylens.registry import diagnostic as diagnostic
    from entropylens.schedule import Schedule as Schedule
    from entropylens.store.reader import Run as Run
    from entropylens.store.reader import list_runs as list_runs
    from entropylens.store.reader import open_run as open_run

__version__ = "0.1.0"

_HOME = {
    "Diagnostic": "entropylens.registry",
    "EntropyLensError": "entropylens.errors",
    "Lens": "entropylens.lens",
    "ProbeSet": "entropylens.capture.insides",
    "Run": "entropylens.store.reader",
    "Schedule": "entropylens.schedule",
    "Selection": "entropylens.fine_tuning",
    "StepBound": "entropylens.control.step_bound",
    "all_diagnostics": "entropylens.registry",
    "diagnostic": "entropylens.registry",
    "list_runs": "entropylens.store.reader",
    "open_run": "entropylens.store.reader",
    "select_tensors": "entropylens.fine_tuning",
}

__all__ = [
    "Diagnostic",
    "EntropyLensError",
    "Lens",
    "ProbeSet",
    "Run",
    "Schedule",
    "Selection",
    "StepBound",
    "__version__",
    "all_diagnostics",
    "diagnostic",
    "list_runs",
    "open_run",
    "select_tensors",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"{name}: expected torch to be installed, got none; "
                f"pip install 'entropylens[torch]'"
            ) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
