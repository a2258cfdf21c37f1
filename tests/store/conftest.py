import os

import pytest


@pytest.fixture(autouse=True)
def no_power_is_lost(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing waits for the disk: a kill loses no page that the system holds."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    return synced
