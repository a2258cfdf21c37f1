import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import entropylens as el
from entropylens import following
from entropylens.following import Followed, Followers
from entropylens.registry import write_dictionary
from entropylens.rules import entropy_law, forecast


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rows(step: int, phase: str = "train", **values: Any) -> dict[str, Any]:
    names = [name.replace("__", "/") for name in values]
    return {"name": names, "value": np.array([*values.values()]), "module": "", "phase": phase} | {
        "step": step
    }


def entropy_at(step: int) -> float:
    return float(1.2 * np.exp(-step / 60))


def follow(
    followers: Followers, clock: Clock, steps: range, *, reward: str = "reward__mean"
) -> list[Followed]:
    """A run of one step a second that keeps the law, with a little noise."""
    found = []
    for step in steps:
        generator = np.random.default_rng(step)
        entropy = entropy_at(step) * (1 + 0.01 * generator.standard_normal())
        paid = 0.6 - 0.2 * np.exp(entropy) + 0.005 * generator.standard_normal()
        followers.follow(rows(step, "rollout", **{reward: paid}))
        clock.now += 1
        found.append(followers.follow(rows(step, entropy__token__mean=entropy)))
    return found


def test_a_law_and_a_forecast_are_written_and_told_once() -> None:
    clock = Clock()
    found = follow(Followers(clock), clock, range(1, 201))
    written = [one for one in found if one.metrics]
    assert [one.step for one in written] == [*range(50, 201, 25)]  # 30 pairs are needed
    law = written[-1].metrics
    assert law["law/identified"] == 1
    assert law["law/slope"] == pytest.approx(0.2, abs=0.02)
    assert law["law/ceiling/low"] < law["law/ceiling/estimate"] < law["law/ceiling/high"]
    assert law["law/ceiling/estimate"] == pytest.approx(0.4, abs=0.01)
    truth = next(s for s in range(1000) if entropy_at(s) < 0.1)
    before = next(one for one in written if one.step == 125).metrics
    assert before["forecast/floor/low"] <= truth <= before["forecast/floor/high"]
    events = [event for one in found for event in one.events]
    assert [event["kind"] for event in events].count("law") == 1
    (told,) = (event for event in events if event["kind"] == "law")
    assert told["severity"] == "info"
    assert "R = -0.2" in told["message"]
    alarm = next(event for event in events if event["severity"] == "warning")
    assert (alarm["kind"], alarm["rule"]) == ("forecast", "forecast/floor")
    assert "below 0.1 nats" in alarm["message"]


def test_every_name_that_is_written_is_defined(tmp_path: Path) -> None:
    clock = Clock()
    written = {n for one in follow(Followers(clock), clock, range(1, 151)) for n in one.metrics}
    assert written == {*entropy_law.METRICS, *forecast.METRICS}
    write_dictionary(tmp_path / "dictionary.json")
    defined = json.loads((tmp_path / "dictionary.json").read_text())["metrics"]
    assert defined["law/slope"]["diagnostic"] == "entropy_law"
    assert defined["forecast/floor/step"]["diagnostic"] == "forecast"
    assert written <= defined.keys()
    assert all(all(defined[name].values()) for name in written)


def test_fits_wait_for_steps_and_for_time() -> None:
    clock = Clock()
    followers = Followers(clock)
    found = follow(followers, clock, range(1, 101))
    clock.now -= 100
    assert not any(one.metrics for one in follow(followers, clock, range(101, 200)))
    assert sum(bool(one.metrics) for one in found) == 3


def test_a_slow_fit_makes_the_next_wait_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, fits = Clock(), []

    def slow(*args: Any, **options: Any) -> Any:
        fits.append(round(clock.now))
        clock.now += 0.3
        return forecast.forecast_crossing(*args, **options)

    monkeypatch.setattr(following, "forecast_crossing", slow)
    follow(Followers(clock), clock, range(1, 201))
    assert fits == [25, 126]


def test_a_run_without_a_reward_is_left_alone_and_evaluations_are_not_followed() -> None:
    clock = Clock()
    followers = Followers(clock)
    for step in range(1, 101):
        clock.now += 1
        found = followers.follow(rows(step, entropy__token__mean=entropy_at(step)))
        assert (found.metrics, found.events) == ({}, [])
        followers.follow(rows(step, "eval", reward__mean=0.5, entropy__token__mean=9.0))
        followers.follow({**rows(step, reward__mean=0.5), "module": "layer"})


def test_the_frameworks_reward_stands_in() -> None:
    clock = Clock()
    found = follow(Followers(clock), clock, range(1, 101), reward="framework__reward")
    assert found[-1].metrics["law/identified"] == 1


def test_entropies_of_one_step_are_compared_with_the_frameworks_where_asked() -> None:
    own: dict[str, Any] = {
        "entropy__token__mean": 1.0,
        "entropy__token__std": 0.5,
        "entropy__token__count": 100.0,
    }
    for asked in (False, True):
        followers = Followers(Clock())
        followers.checks_framework_entropy = asked
        followers.follow({**rows(3, **own), "weight": 100.0})
        assert not followers.follow(rows(2, framework__entropy=2.0)).events
        found = followers.follow(rows(3, framework__entropy=1.05))
        assert len(found.events) == asked
    assert found.events[0]["step"] == 3
    assert found.events[0]["evidence"]["standard_error"] == 0
    sampled = Followers(Clock())
    sampled.checks_framework_entropy = True
    sampled.follow({**rows(3, **own), "weight": 1000.0})
    assert not sampled.follow(rows(3, framework__entropy=1.05)).events


def test_a_long_run_is_kept_in_bins_and_keeps_its_law() -> None:
    clock = Clock()
    followers = Followers(clock)
    for step in range(1, 6001):
        entropy = 0.05 + 1.2 * np.exp(-step / 2000)
        values = {"entropy__token__mean": entropy, "reward__mean": 0.6 - 0.2 * np.exp(entropy)}
        clock.now += 0.01
        found = followers.follow(rows(step, **values))
        if found.metrics:
            last = found
    assert len(followers._entropy) <= following._BINS
    assert last.metrics["law/slope"] == pytest.approx(0.2, abs=1e-3)
    assert last.metrics["law/ceiling/estimate"] == pytest.approx(0.4, abs=1e-3)


def test_a_run_shows_its_law_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SECONDS", 0.0)
    monkeypatch.setattr(following, "SHARE", 1e9)
    with el.Lens(run_dir=tmp_path / "run", max_overhead=None) as lens:
        lens.forward("law/*")
        lens.follow(framework_entropy=True)
        for step in range(1, 101):
            entropy = entropy_at(step)
            lens.log({"token/mean": entropy}, source="entropy", step=step)
            lens.log(
                {"mean": 0.6 - 0.2 * np.exp(entropy)}, source="reward", phase="rollout", step=step
            )
            lens.step()
            forwarded = lens.take_latest()
    assert forwarded["law/ceiling/estimate"] == pytest.approx(0.4, abs=1e-6)
    table = el.open_run(tmp_path / "run").metrics().to_pandas()
    found = table[table["name"] == "law/slope"]
    assert found["value"].iloc[-1] == pytest.approx(0.2, abs=1e-6)
    assert found["step"].iloc[-1] == 100


def test_a_rule_that_raises_is_a_counted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise FloatingPointError("broken")

    monkeypatch.setattr(following, "fit_entropy_law", broken)
    with el.Lens(run_dir=tmp_path / "run") as lens:
        for step in range(1, 61):
            lens.log({"token/mean": entropy_at(step)}, source="entropy")
            lens.log({"mean": 0.5}, source="reward")
            lens.step()
    run = el.open_run(tmp_path / "run")
    assert run.status()[0].faults == {"following: FloatingPointError": 1}
    assert (run.metrics().to_pandas()["name"] == "reward/mean").sum() == 60


def test_other_ranks_do_not_follow(tmp_path: Path) -> None:
    place = {"run_dir": tmp_path / "run", "world_size": 2}
    with el.Lens(rank=0, **place) as first, el.Lens(rank=1, **place) as lens:  # type: ignore[arg-type]
        assert first._session.followers is not None
        lens.follow(framework_entropy=True)
        assert lens._session.followers is None


def test_a_verdict_that_does_not_last_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    fits: list[int] = []

    def wavering(*args: Any, **options: Any) -> Any:
        fits.append(len(fits))
        found = forecast.forecast_crossing(*args, **options)
        lasting = len(fits) > 5
        return replace(found, status="reached" if len(fits) % 2 or lasting else "not identified")

    monkeypatch.setattr(following, "forecast_crossing", wavering)
    found = follow(Followers(clock), clock, range(1, 201))
    told = [(one.step, event["severity"]) for one in found for event in one.events]
    assert [step for step, severity in told if severity == "warning"] == [150]
