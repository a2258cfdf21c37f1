import json
import re
from pathlib import Path

import numpy as np
import pytest

from entropylens.analysis.entropy_law import law_sentences, read_entropy_law, score_rows
from entropylens.analysis.overview import Curve, read_overview, sentences
from entropylens.analysis.report import write_report
from entropylens.store.reader import Run, open_run
from entropylens.store.writer import RunWriter

STEPS = np.arange(1, 241)


def policy(seed: int = 0) -> tuple[Curve, Curve]:
    """Entropy and reward of a run that keeps the law and crosses 0.1 nats at step 178."""
    generator = np.random.default_rng(seed)
    entropy = 1.2 * np.exp(-STEPS / 71.6) * (1 + 0.02 * generator.standard_normal(240))
    reward = 0.6 - 0.2 * np.exp(entropy) + 0.01 * generator.standard_normal(240)
    return Curve("entropy/token/mean", STEPS, entropy), Curve("reward/mean", STEPS, reward)


def written(path: Path, *, with_reward: bool) -> Run:
    writer = RunWriter(path)
    entropy, reward = policy()
    for step, h, r in zip(STEPS, entropy.values, reward.values, strict=True):
        writer.write("metrics", {"step": step, "name": ["entropy/token/mean"], "value": h})
        if with_reward:
            row = {"step": step, "name": ["reward/mean"], "value": r, "phase": "rollout"}
            writer.write("metrics", row)
        writer.step = int(step)
    writer.close()
    return open_run(path)


def test_the_law_the_end_and_the_early_forecast_are_said() -> None:
    entropy, reward = policy()
    found = read_entropy_law({entropy.name: entropy}, {reward.name: reward})
    assert found is not None
    law, end, early = law_sentences(found)
    assert re.match(r"Reward followed R = -0\.(19|20|2)\d* e\^H \+ 0\.(59|6)", law)
    assert re.search(r"it would end at 0\.(39|4)\d* \(95%: ", law)
    assert re.fullmatch(r"Entropy has been below 0\.1 nats since step 1[78]\d\.", end)
    assert re.match(r"A forecast from the first 15% of the run said step \d+ for entropy", early)
    shares = [row[0] for row in score_rows(found)]
    assert shares == ["15%", "30%", "50%"]
    assert all(
        row[3].startswith("step 17") or row[3].startswith("step 18") for row in score_rows(found)
    )


def test_a_run_that_goes_on_is_told_where_it_leads() -> None:
    entropy, reward = policy()
    cut = [Curve(one.name, one.steps[:120], one.values[:120]) for one in (entropy, reward)]
    found = read_entropy_law({one.name: one for one in cut}, {})
    assert found is not None
    assert "Going on like this, entropy would fall below 0.1 nats around step" in " ".join(
        law_sentences(found)
    )


def test_a_reward_that_owes_nothing_to_entropy_is_said_to() -> None:
    entropy, _ = policy()
    noise = Curve("framework/reward", STEPS, np.random.default_rng(1).standard_normal(240))
    found = read_entropy_law({entropy.name: entropy, noise.name: noise}, {})
    assert found is not None
    assert found.reward_name == "framework/reward"
    assert law_sentences(found)[0].startswith("Reward and entropy show no law")


def test_without_a_reward_without_entropy_or_without_a_common_step_there_is_nothing() -> None:
    entropy, reward = policy()
    later = Curve(reward.name, reward.steps + 1000, reward.values)
    assert read_entropy_law({entropy.name: entropy}, {}) is None
    assert read_entropy_law({reward.name: reward}, {}) is None
    assert read_entropy_law({entropy.name: entropy}, {later.name: later}) is None


def test_few_steps_have_words_and_figures_too() -> None:
    entropy, reward = policy()
    cut = [Curve(one.name, one.steps[:3], one.values[:3]) for one in (entropy, reward)]
    found = read_entropy_law({cut[0].name: cut[0]}, {cut[1].name: cut[1]})
    assert found is not None
    assert law_sentences(found) == [
        "Reward and entropy show no law R = -a e^H + b in this run: 3 steps with both, 30 are "
        "needed."
    ]


@pytest.mark.parametrize("with_reward", [True, False])
def test_the_report_has_the_section_where_there_is_a_reward(
    tmp_path: Path, with_reward: bool
) -> None:
    run = written(tmp_path / "run", with_reward=with_reward)
    page = write_report(run, tmp_path / "report.html").read_text()
    figures = json.loads(re.search(r"const figures = (.*);\n", page)[1])  # type: ignore[index]
    assert ("Reward followed R" in "\n".join(sentences(read_overview(run)))) == with_reward
    assert ("<h2>Entropy and reward</h2>" in page) == with_reward
    assert ("<h2>Forecasts of the end of entropy</h2>" in page) == with_reward
    assert ({"law", "forecast"} <= figures.keys()) == with_reward
    if with_reward:
        said = "\n".join(sentences(read_overview(run)))
        assert "Mean reward went from" in said
        assert "The loss went from" not in said
        dots, _, high, line = figures["law"]["data"][:4]
        assert dots["mode"] == "markers"
        assert len(dots["x"]["bdata"] if isinstance(dots["x"], dict) else dots["x"]) >= 240
        assert high["fill"] == "tonexty"
        assert line["name"] == "law"
        shapes = figures["forecast"]["layout"]["shapes"]
        assert [shape["y0"] for shape in shapes] == [0.1]
