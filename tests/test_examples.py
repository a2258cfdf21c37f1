"""The scripts that the pages about integrations show."""

import logging
import re
import runpy
from pathlib import Path

import pytest

import entropylens as el

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SAID = {
    "plain_loop": r"60 steps, each once; loss [\d.]+ to [\d.]+; 2 attempts",
    "hugging_face": r"60 steps, each once; .*; 2 attempts; .* of 'letter \d+' at step \d+",
    "lightning_module": r"\d+ steps, each once; .* held out [\d.]+; 2 attempts",
    "trl_sft_dpo": r"sft: entropy .* within \de-0[5-9] of TRL's own\ndpo: .* within \de-0[5-9] of",
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", SAID)
def test_an_example_does_what_its_page_says(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(SAID[name], capsys.readouterr().out), name
    for run in el.list_runs(tmp_path / "runs"):
        assert run.state() == "finished"
        assert run.status()[0].faults == {}
        losses = run.metrics("loss/mean", phases="train").to_arrow()["step"].to_pylist()
        assert losses == list(range(1, len(losses) + 1))


def test_every_example_is_run_and_shown() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(SAID)
    pages = "".join(path.read_text() for path in EXAMPLES.parent.glob("*.md"))
    assert all(f"examples/{name}.py" in pages for name in names)
