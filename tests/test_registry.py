import json
from pathlib import Path
from typing import Any

import pytest

import entropylens as el
from entropylens import registry
from entropylens.registry import (
    Block,
    Diagnostic,
    all_diagnostics,
    diagnostic,
    resolve_schedules,
    write_dictionary,
)


def test_the_committed_dictionary_is_what_the_registered_diagnostics_say(tmp_path: Path) -> None:
    fresh = tmp_path / "dictionary.json"
    write_dictionary(fresh)
    committed = Path(registry.__file__).with_name("dictionary.json")
    assert committed.read_text() == fresh.read_text(), "run `make dictionary` and commit it"
    assert "entropy/token/mean" in json.loads(fresh.read_text())["metrics"]


def test_a_preset_can_be_overruled_diagnostic_by_diagnostic() -> None:
    chosen: dict[str, Any] = {
        "token_entropy": 7,
        "surprisal": False,
        "update_norm": el.Schedule(3, floor=9),
    }
    schedules = resolve_schedules("balanced", chosen)
    assert schedules["token_entropy"].every == 7
    assert "surprisal" not in schedules
    assert schedules["update_norm"] == el.Schedule(3, floor=9)
    assert (
        schedules["training_vitals"] == all_diagnostics()["training_vitals"].schedules["balanced"]
    )


def test_what_a_preset_leaves_off_can_be_switched_on() -> None:
    assert "update_norm" not in resolve_schedules("fast", {})
    assert resolve_schedules("fast", {"update_norm": 5})["update_norm"].every == 5


def test_an_unknown_diagnostic_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"expected a diagnostic .* did you mean 'token_entropy'"):
        resolve_schedules("fast", {"token_entrop": 1})


def test_a_diagnostic_declared_wrongly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reads to be one of tokens, .* got 'wieghts'"):
        diagnostic(reads="wieghts", every={"fast": 1})(_Nothing)
    with pytest.raises(ValueError, match=r"expected presets fast, balanced, full, got \['slow'\]"):
        diagnostic(reads="tokens", every={"slow": 1})(_Nothing)


def test_two_classes_in_one_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    diagnostic(reads="tokens", every={"fast": 1})(_Nothing)
    with pytest.raises(ValueError, match="expected one registered class a file, got _Nothing"):
        diagnostic(reads="tokens", every={"fast": 1})(_Other)


class _Nothing(Diagnostic):
    def measure(self, reading: Any, state: Any) -> tuple[list[Block], Any]:
        return [], state


class _Other(_Nothing):
    pass


def test_true_switches_on_what_the_preset_has_off() -> None:
    assert resolve_schedules("fast", {"update_norm": True})["update_norm"].every == 100
    assert resolve_schedules("full", {"update_norm": True})["update_norm"].every == 10
