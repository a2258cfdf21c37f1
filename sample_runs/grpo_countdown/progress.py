"""A progress bar for any trainer of transformers or TRL."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import PrinterCallback, TrainerCallback

__all__ = ["shown"]


@contextmanager
def shown(trainer: Any, title: str, names: tuple[str, ...], console: Console) -> Iterator[None]:
    """Show a trainer's steps, and the latest of what it logs under some names, while it trains."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[latest]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=trainer.args.max_steps, latest="")

        class Shown(TrainerCallback):  # type: ignore[misc]
            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
            ) -> None:
                found = [f"{name} {float(logs[name]):.2f}" for name in names if name in logs]
                bar.update(task, completed=state.global_step, latest=", ".join(found))

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Shown())
        yield
