"""The sample run at a tiny size: its puzzles and verifier, its base, its log, its figures."""

import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("trl")

import entropylens as el
from sample_runs.grpo_countdown import countdown, evaluation, train
from sample_runs.grpo_countdown.base import Size
from sample_runs.grpo_countdown.countdown import Puzzle, draw_puzzles, verify

pytestmark = pytest.mark.filterwarnings("ignore")

PUZZLE = Puzzle((14, 5, 5), 14)
TINY = Size(
    width=24, layers=1, held_out=4, sft_steps=2, sft_puzzles=16, rl_puzzles=8, batch=8, group=4
)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("14+5-5", 1.0),
        (" -5+14+5", 1.0),
        ("14+5+5", 0.05),
        ("14", 0.05),
        ("5+5+4", 0.05),
        ("14+5-", 0.01),
        ("14,5,5", 0.01),
        ("", 0.01),
    ],
    ids=[
        "right",
        "right in another order",
        "wrong value",
        "right value of too few numbers",
        "right value of other numbers",
        "no expression",
        "no number",
        "nothing",
    ],
)
def test_the_verifier_rewards_right_answers_only(answer: str, score: float) -> None:
    assert verify(answer, PUZZLE) == score
    columns: dict[str, Any] = {"numbers": [[1, 2, 3], [14, 5, 5]], "target": [6, 14]}
    assert countdown.reward(["1+2+3", answer], **columns, prompts=["", ""]) == [1.0, score]


def test_every_right_answer_is_found_and_is_right() -> None:
    assert PUZZLE.right_answers() == sorted(
        ["14+5-5", "14-5+5", "5+14-5", "-5+14+5", "5-5+14", "-5+5+14"]
    )
    for puzzle in draw_puzzles(20, seed=3):
        found = puzzle.right_answers()
        assert {verify(answer, puzzle) for answer in found} == {1.0}
        assert max(map(len, found)) < countdown.LONGEST_ANSWER
        signed = (
            [f"{sign}{number}" for sign, number in zip(signs, puzzle.numbers, strict=True)]
            for signs in product("+-", repeat=3)
        )
        reaching = [terms for terms in signed if eval("".join(terms)) == puzzle.target]
        assert {"".join(terms).removeprefix("+") for terms in reaching} <= set(found)


def test_no_held_out_puzzle_is_trained_on_in_whatever_order() -> None:
    held_out = draw_puzzles(50, seed=1)
    drawn = draw_puzzles(400, seed=2, without=held_out)
    assert len(drawn) == 400
    assert orderless(held_out) & orderless(draw_puzzles(400, seed=2))
    assert not orderless(held_out) & orderless(drawn)


def orderless(puzzles: Sequence[Puzzle]) -> set[str]:
    return {f"{sorted(puzzle.numbers)} {puzzle.target}" for puzzle in puzzles}


def test_prompts_and_answers_survive_the_tokenizer_and_no_power_can_be_written() -> None:
    tokenizer = countdown.make_tokenizer()
    text = PUZZLE.prompt + "-5+14+5" + tokenizer.eos_token
    tokens = tokenizer(text).input_ids
    assert len(tokens) == len(PUZZLE.prompt) + 8
    assert tokenizer.decode(tokens, skip_special_tokens=True) == PUZZLE.prompt + "-5+14+5"
    assert not set("*/^(") & set("".join(tokenizer.get_vocab()))


def test_figures_count_right_and_different_answers() -> None:
    answers = [
        evaluation.Answers(PUZZLE, "14+5-5", ("14+5-5", "14+5-5", "5-5+14", "9")),
        evaluation.Answers(PUZZLE, "14", ("1", "2", "3", "4")),
    ]
    found = evaluation.summarise(answers)
    assert found["greedy"] == 0.5
    assert found["pass@1"] == 3 / 8
    assert found["pass@4"] == 0.5
    assert found["distinct"] == 3.5
    assert found["distinct_right"] == 1.0
    assert found["standard_error"]["distinct"] == pytest.approx(0.5)


class Oracle(torch.nn.Module):
    """Answers each puzzle rightly when greedy, and when sampled with its numbers in turn."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def generate(
        self, input_ids: torch.Tensor, do_sample: bool, num_return_sequences: int = 1, **_: Any
    ) -> torch.Tensor:
        rows = []
        for prompt in self.tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            numbers, target = prompt.rstrip(":").split(">")
            puzzle = Puzzle(tuple(map(int, numbers.split(","))), int(target))
            said: Sequence[str] = numbers.split(",") if do_sample else puzzle.right_answers()
            rows += [said[at % len(said)] for at in range(num_return_sequences)]
        self.tokenizer.padding_side = "right"
        answers = self.tokenizer(rows, return_tensors="pt", padding=True).input_ids
        self.tokenizer.padding_side = "left"
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), answers], dim=1)


def test_each_answer_is_judged_by_its_own_puzzle() -> None:
    tokenizer = countdown.make_tokenizer()
    puzzles = [p for p in draw_puzzles(100, seed=4) if len(set(p.numbers)) == 3][:70]
    oracle, state = Oracle(tokenizer).train(), torch.get_rng_state()
    found = evaluation.evaluate(oracle, tokenizer, puzzles)
    assert found["puzzles"] == len(puzzles) == 70  # more than one batch
    assert found["greedy"] == 1.0
    assert (found["pass@1"], found["distinct"], found["distinct_right"]) == (0.0, 3.0, 0.0)
    assert oracle.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_run_goes_through_is_not_trained_twice_and_refuses_what_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, base = tmp_path / "run", tmp_path / "base"
    asked = ["--run", "adaptive", "--steps", "2", "--out", str(out), "--base", str(base)]
    threads = ["--threads", str(torch.get_num_threads())]
    assert train.main([*asked, *threads], TINY) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "On 4 puzzles that were held out, with 16 answers to each" in said
    assert "any of 16 right (pass@16)" in said

    run = el.open_run(out)
    assert run.state() == "finished"
    assert run.status()[0].faults == {}
    assert run.metrics("framework/reward").to_arrow()["step"].to_pylist() == [1, 2]
    assert run.metrics("entropy/token/mean").to_arrow().num_rows
    user = run.config["user"]
    assert (user["use_adaptive_entropy"], user["entropy_target"]) == (True, 0.35)
    assert (user["learning_rate"], user["num_generations"]) == (3e-4, 4)
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["before"] == json.loads((base / "base.json").read_text())["evaluation"]
    assert figures["after"]["puzzles"] == 4

    assert train.main([*asked, *threads], TINY) == 0
    assert "is finished" in " ".join(capsys.readouterr().out.split())
    assert el.open_run(out).run_id == run.run_id

    (out / "evaluation.json").unlink()  # as when it broke off before the end
    assert train.main([*asked, *threads], TINY) == 0
    assert el.open_run(out).run_id != run.run_id

    with pytest.raises(SystemExit, match="a run with the same settings that has ended"):
        train.main([*asked, *threads, "--seed", "1"], TINY)
    with pytest.raises(SystemExit, match=r"load_base: expected a policy of .*'sft_steps': 3"):
        train.main(["--run", "base", "--base", str(base), *threads], replace(TINY, sft_steps=3))


def test_a_run_without_an_entropy_target_is_known_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--run", "collapse", "--steps", "1", "--out", str(tmp_path / "run")]
    asked += ["--base", str(tmp_path / "base"), "--threads", str(torch.get_num_threads())]
    assert train.main(asked, TINY) == 0
    assert not el.open_run(tmp_path / "run").config["user"]["use_adaptive_entropy"]
    assert train.main(asked, TINY) == 0
    assert "is finished" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_what_to_install_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=f"{missing}.*pip install -e '..hf.' trl reasoning"):
        runpy.run_path(train.__file__)
