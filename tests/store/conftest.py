import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long proofs run only where they are asked for: ``pytest -m soak``."""
    if "soak" not in config.option.markexpr:
        long = [item for item in items if "soak" in item.keywords]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(autouse=True)
def no_power_is_lost(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing waits for the disk: a kill loses no page that the system holds."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    return synced
