"""What a model is given is seen wherever a loop calls it, and never held on to for nothing."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from untouched import tiny

import entropylens as el
from entropylens.capture.call import Call
from entropylens.capture.inputs import InputsTap
from entropylens.registry import all_diagnostics

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = 4


class Events:
    def __init__(self) -> None:
        self.wants_calls = True
        self.told: list[tuple[Call, Tensor | None]] = []

    def take_call(self, call: Call, logits: Tensor | None) -> None:
        self.told.append((call, logits))


def unguarded(where: str, work: Callable[[], None]) -> None:
    work()


def tapped(model: nn.Module) -> tuple[Events, InputsTap]:
    events = Events()
    return events, InputsTap(model, events, unguarded)


def features(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(seed))


def classes(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.CLASSES, (ROWS,), generator=generator)


class Wrapper(nn.Module):
    """A network and its loss, as a LightningModule has them."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or tiny.Perceptron()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, *, targets: Tensor) -> Tensor:
        return self.loss(self.net(x), targets)


def test_the_outermost_module_is_told_last_with_all_that_it_was_given() -> None:
    model, given = nn.Sequential(tiny.Perceptron()), features()
    events, _ = tapped(model)
    output = model(given)
    call, logits = events.told[-1]
    assert call.module is model
    assert torch.equal(call.args[0], given)
    assert logits is not None
    assert torch.equal(logits, output)
    assert not logits.requires_grad


def test_arguments_are_told_without_the_graph_behind_them() -> None:
    class OfMany(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
            return self.other(self.one(x))

    events, _ = tapped(model := OfMany())
    given = features().requires_grad_() * 2
    model(given, scale=given)
    model(given, {"nested": [given]}, scale=given)
    (plain, _), (nested, _) = events.told
    for call in (plain, nested):
        assert not call.args[0].requires_grad
        assert not call.kwargs["scale"].requires_grad
    assert not nested.args[1]["nested"][0].requires_grad


def test_a_network_is_seen_whose_wrapper_is_never_called() -> None:
    model, given = Wrapper(), features()
    events, _ = tapped(model)
    model.net(given)
    call, logits = events.told[-1]
    assert call.module is model.net
    assert logits is not None


def test_a_wrapper_that_returns_a_loss_does_not_hide_its_network_s_logits() -> None:
    model, given = Wrapper(), features()
    events, _ = tapped(model)
    for _ in range(2):
        model(given, targets=classes())
        call, logits = events.told[-1]
        assert call.module is model.net
        assert logits is not None


def test_a_model_without_logits_is_told_of_with_what_it_was_given() -> None:
    class OnlyLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, tiny.CLASSES)

        def forward(self, x: Tensor, *, targets: Tensor) -> Tensor:
            return cross_entropy(self.other(self.one(x)), targets)

    events, _ = tapped(model := OnlyLoss())
    for _ in range(2):
        model(features(), targets=classes())
    assert [logits for _, logits in events.told] == [None, None]
    assert set(events.told[0][0].kwargs) == {"targets"}


def test_a_part_that_holds_not_all_that_is_trained_is_not_watched() -> None:
    model = nn.Sequential(tiny.Perceptron(), nn.Linear(tiny.CLASSES, 2))
    events, _ = tapped(model)
    model[0](features())
    assert events.told == []
    model[1].requires_grad_(False)
    events, _ = tapped(model)
    model[0](features())
    assert events.told[-1][0].module is model[0]


def test_of_a_compiled_model_the_one_within_is_asked() -> None:
    model: Any = torch.compile(tiny.Perceptron(), backend="eager")
    events, tap = tapped(model)
    model(features())
    ((call, logits),) = events.told
    assert call.module is model._orig_mod
    assert logits is not None
    tap.remove()
    model(features())
    assert len(events.told) == 1


def test_evaluation_and_recomputation_are_not_seen() -> None:
    model = tiny.Perceptron()
    events, _ = tapped(model)
    with torch.no_grad():
        model(features())
    assert events.told == []
    given = features().requires_grad_()
    checkpoint(model, given, use_reentrant=True).sum().backward()
    assert given.grad is not None
    assert events.told == []
    model(features())
    assert events.told != []


def test_nothing_is_told_where_nobody_asks_or_once_it_is_removed() -> None:
    model = Wrapper()
    events, tap = tapped(model)
    events.wants_calls = False
    model.net(features())
    assert events.told == []
    events.wants_calls = True
    tap.remove()
    model.net(features())
    assert events.told == []
    assert all(not module._forward_hooks for module in model.modules())


# -- in a loop --------------------------------------------------------------------------------


def train(
    folder: Path,
    model: Any,
    loss: Callable[[int], Tensor],
    *,
    steps: int = 2,
    shown: Callable[[], dict[str, Any]] = dict,
    **settings: Any,
) -> el.Run:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    settings = {"preset": "full", "max_overhead": None, **settings}
    with el.Lens(model, optimizer, run_dir=folder / "run", **settings) as lens:
        for number in range(steps):
            loss(number).backward()
            if given := shown():
                lens.observe(**given)
            optimizer.step()
            optimizer.zero_grad()
            lens.step()
    run = el.open_run(folder / "run")
    assert run.status()[0].faults == {}
    return run


def names(run: el.Run, pattern: str) -> set[str]:
    return {str(name) for name in run.metrics(pattern).to_arrow()["name"].to_pylist()}


def told(run: el.Run) -> list[str]:
    rows = run.events().to_arrow().to_pylist()
    return [str(row["message"]) for row in rows if row["kind"] == "capture"]


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits.detach().double()).entropy().mean()


def test_a_plain_loop_shows_what_its_updates_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny.Perceptron()
    before = entropy(model.eval()(features()))
    run = train(
        tmp_path, model.train(), lambda _: cross_entropy(model(features()), classes()), steps=1
    )
    after = entropy(model.eval()(features()))
    found = run.metrics("entropy/change/measured").to_arrow()["value"].to_pylist()
    assert found == [pytest.approx(float(after - before), rel=1e-3)]
    assert {"entropy/change/predicted", "entropy/change/exact/share"} <= names(
        run, "entropy/change/*"
    )
    assert not any("/at/" in name for name in names(run, "entropy/change/*"))
    assert any("ghost/" in name for name in names(run, "ghost/*"))


def test_a_classifier_of_transformers_shows_what_its_updates_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = tiny.classifier(), torch.randint(2, 15, (ROWS, 9))
    run = train(tmp_path, model, lambda _: model(input_ids=ids, labels=classes()).loss)
    rows = run.metrics("entropy/change/measured").to_arrow().to_pylist()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["value"] for row in rows)
    shares = run.metrics("entropy/change/exact/share").to_arrow()["value"].to_pylist()
    assert shares == [1.0, 1.0]


@pytest.mark.parametrize("shows", [False, True], ids=["", "loss module"])
def test_images_have_their_classes_behind_the_batch(shows: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 1))
    images, targets = torch.randn(ROWS, 3, 4, 6), torch.randint(5, (ROWS, 4, 6))
    before = entropy(model(images).movedim(1, -1))
    criterion = nn.CrossEntropyLoss()
    run = train(
        tmp_path,
        model,
        lambda _: criterion(model(images), targets),
        steps=1,
        reads=[criterion] if shows else None,
    )
    after = entropy(model(images).movedim(1, -1))
    found = run.metrics("entropy/change/measured").to_arrow()["value"].to_pylist()
    assert found == [pytest.approx(float(after - before), rel=1e-3)]


def test_a_wrapper_s_network_shows_what_its_updates_do(tmp_path: Path) -> None:
    model = Wrapper()
    inner = train(tmp_path / "a", model, lambda _: model.loss(model.net(features()), classes()))
    outer = train(tmp_path / "b", model, lambda _: model(features(), targets=classes()))
    for run in (inner, outer):
        assert "entropy/change/measured" in names(run, "entropy/change/*")
        assert not any("no entropy/change" in message for message in told(run))


def test_a_causal_model_whose_loss_is_outside_shows_what_its_updates_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = tiny.llama(), torch.randint(2, 15, (ROWS, 9))

    def loss(_: int) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    before = entropy(model.eval()(input_ids=ids).logits)
    model.train()
    run = train(tmp_path, model, loss, steps=1)
    after = entropy(model.eval()(input_ids=ids).logits)
    found = run.metrics("entropy/change/measured").to_arrow()["value"].to_pylist()
    assert found == [pytest.approx(float(after - before), rel=1e-3)]


def test_logits_are_not_held_until_the_step_ends(tmp_path: Path) -> None:
    model, made, alive = tiny.Perceptron(), [], []

    def loss(_: int) -> Tensor:
        logits = model(features())
        made.append(weakref.ref(logits.untyped_storage()))
        return cross_entropy(logits, classes())

    def shown() -> dict[str, Any]:
        alive.append(made[-1]() is not None)
        return {}

    run = train(tmp_path, model, loss, shown=shown)
    assert alive == [False, False]
    assert "entropy/change/measured" in names(run, "entropy/change/*")


def test_nothing_is_kept_or_asked_where_nobody_wants_to_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError

    known = all_diagnostics().items()
    off = {name: False for name, found in known if found.reads == "probe"}
    assert "entropy_change" in off
    for name in ("obstacle", "UpdateProbe"):
        monkeypatch.setattr(f"entropylens.updates.{name}", refused)
    model = tiny.Perceptron()
    run = train(
        tmp_path, model, lambda _: cross_entropy(model(features()), classes()), diagnostics=off
    )
    assert names(run, "entropy/change/*") == set()


def test_hooks_are_gone_when_the_lens_is_closed(tmp_path: Path) -> None:
    model = Wrapper()
    train(tmp_path, model, lambda _: model.loss(model.net(features()), classes()))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
