"""A net that learns and one that memorises: Fashion-MNIST with its labels, and with them shuffled.

A small convolutional net is trained by Lightning, watched by entropylens, on 1,000 images until it
knows every label by heart: once with the labels as they are, once with the same labels in another
order. What sets the two apart, of all that representations are measured by?

    python sample_runs/fashion_overfit/run.py [--seeds 0 1 2 3 4] [--labels clean shuffled]
        [--out DIR] [--figure FILE]

Each training has its log in ``out/fashion_overfit/LABELS-seed-N``, and ``measurements.parquet`` in
it; those of all are in ``measurements.parquet`` beside them. A training that is finished is not
done again. ``--figure`` needs kaleido and a browser.
"""

import argparse
import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

import entropylens as el

try:
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers.logger import DummyLogger
    from torch.utils.data import DataLoader, TensorDataset

    from entropylens_callbacks.lightning import EntropyLensCallback
    from sample_runs.fashion_overfit.figure import draw
    from sample_runs.fashion_overfit.images import FOLDER, Labelled, Split, read_split, shuffled
    from sample_runs.fashion_overfit.measuring import Measuring
    from sample_runs.fashion_overfit.net import Classifier
    from sample_runs.fashion_overfit.ranking import (
        changes_columns,
        changes_rows,
        follows,
        ranking_columns,
        ranking_rows,
    )
except ModuleNotFoundError as error:
    raise SystemExit(
        f"run.py: expected entropylens and lightning to be installed, got {error}; "
        f"pip install -e '.[lightning]'"
    ) from None

OUT: Final = Path("out/fashion_overfit")
LABELS: Final = ("clean", "shuffled")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the trainings are."""

    trained: int = 1000
    held_out: int = 2000
    probe: int = 512
    """Rows, of those trained on and of those held out, whose states are looked at."""
    epochs: tuple[int, ...] = (0, 1, 2, 3, 5, 8, 12, 20, 30, 45, 60)
    """After which representations are measured; after the last one training ends."""
    batch: int = 32
    rate: float = 2e-3
    """Adam's learning rate."""


def main(arguments: Sequence[str] | None = None, size: Size | None = None) -> int:
    """Train what is asked for, unless it is there, and say what sets the two apart."""
    asked = _parser().parse_args(arguments)
    size, console = size or Size(), Console(highlight=False)
    torch.set_num_threads(asked.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cells = [(labels, seed) for seed in asked.seeds for labels in asked.labels]
    tables = [
        _measurements(asked.out, asked.data, labels, seed, size)
        for labels, seed in track(cells, "trainings", console=Console(stderr=True))
    ]
    found = pa.concat_tables(tables)
    pq.write_table(found.unify_dictionaries(), asked.out / "measurements.parquet")
    frame = found.to_pandas()
    if set(asked.labels) == set(LABELS) and len(asked.seeds) > 1:
        title = "Layer hidden, 95 % intervals over seeds"
        _show(title, changes_columns(frame), changes_rows(frame), console)
        title = "Left-out runs told apart by a threshold from other seeds, at layer hidden"
        _show(title, ranking_columns(frame), ranking_rows(frame), console)
        alike = follows(frame, "hidden", "dse_released", "norm")
        console.print(f"The released DSE follows the norm of a state: rank correlation {alike:.3f}")
    if asked.figure:
        draw(frame, size.probe).write_image(asked.figure)
    console.print(f"The logs are in {asked.out}: entropylens dashboard {asked.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--labels", choices=LABELS, nargs="+", default=LABELS)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the logs")
    parser.add_argument("--figure", type=Path, help="an image of accuracy, entropy, information")
    parser.add_argument("--data", type=Path, default=FOLDER, help="Fashion-MNIST's folder")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser


def _measurements(out: Path, data: Path, labels: str, seed: int, size: Size) -> pa.Table:
    """Those of one training, which is done now or was before."""
    run_dir = out / f"{labels}-seed-{seed}"
    settings = json.loads(json.dumps({"labels": labels, "seed": seed, **asdict(size)}))
    kept = run_dir / "measurements.parquet"
    if not _is_finished(run_dir, settings, kept):
        split = read_split(data, seed, size.trained, size.held_out)
        _train(run_dir, settings, split, size)
    found = pq.read_table(kept)
    for name, value in (("labels", labels), ("seed", seed)):
        found = found.append_column(name, pa.array([value] * len(found)))
    return found


def _is_finished(run_dir: Path, settings: dict[str, Any], kept: Path) -> bool:
    """Whether a run with these settings is there; what is left of one that broke off is deleted."""
    if not run_dir.exists():
        return False
    try:
        run = el.open_run(run_dir)
    except el.EntropyLensError:
        run = None
    ours = run is not None and run.config.get("user", {}).get("fashion_overfit") == settings
    if run is None or not ours or run.state() in ("running", "stalled"):
        raise SystemExit(
            f"run.py: expected {run_dir} to be free or a run with the same settings that has "
            f"ended, got something else; choose another folder with --out"
        )
    if kept.exists():
        return True
    shutil.rmtree(run_dir)
    return False


def _train(run_dir: Path, settings: dict[str, Any], split: Split, size: Size) -> None:
    trained, seed = split.trained, settings["seed"]
    if settings["labels"] == "shuffled":
        trained = Labelled(trained.images, shuffled(trained.labels, seed))
    torch.manual_seed(seed)
    module = Classifier(split.side, size.rate)
    config = {"fashion_overfit": settings, "source": split.source}
    watcher = EntropyLensCallback(run_dir, config=config)
    rows = {"training": trained, "held_out": split.held_out}
    measuring = Measuring(watcher, size.epochs, rows, size.probe)
    began = time.process_time()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=size.epochs[-1],
        logger=DummyLogger(),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watcher, measuring],
    )
    loader = DataLoader(
        TensorDataset(trained.images, trained.labels),
        batch_size=size.batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    held_out = TensorDataset(split.held_out.images, split.held_out.labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(module, loader, DataLoader(held_out, batch_size=512))
    found = measuring.table()
    took = {"cpu_seconds": str(round(time.process_time() - began, 1)), "source": split.source}
    pq.write_table(found.replace_schema_metadata(took), run_dir / "measurements.parquet")


def _show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console
) -> None:
    table = Table(*columns, title=title, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
