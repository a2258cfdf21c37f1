import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entropylens.analysis.settings import (
    ABSENT,
    Difference,
    Group,
    differences,
    flat_config,
    seed_groups,
)
from entropylens.store.layout import Layout
from entropylens.store.manifest import new_manifest, save_manifest
from entropylens.store.reader import Run, open_run

Make = Callable[..., Run]
NAN = float("nan")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run with settings of the training, of the monitor, and other parts of the manifest."""
    count = 0

    def made(
        user: dict[str, Any] | None = None,
        name: str = "run",
        config: dict[str, Any] | None = None,
        **manifest: Any,
    ) -> Run:
        nonlocal count
        count += 1
        root = tmp_path / str(count)
        root.mkdir()
        settings = {**(config or {}), **({} if user is None else {"user": user})}
        fixed = {"commit": "abc", "versions": {"python": "3.12"}}
        whole = new_manifest(name, 1, settings) | fixed | manifest
        save_manifest(Layout(root), whole)
        return open_run(root)

    return made


# -- settings ------------------------------------------------------------------------------------


def test_a_config_is_flattened_with_dots_and_lists_are_values(make: Make) -> None:
    user = {"lr": 0.1, "data": {"mix": [1, 2], "shuffle": {"on": True}}, "none": None, "empty": {}}
    run = make(user, config={"preset": "full"}, world_size=4, versions={"torch": "2.9"})
    assert flat_config(run) == {
        "preset": "full",
        "user.lr": 0.1,
        "user.data.mix": [1, 2],
        "user.data.shuffle.on": True,
        "user.none": None,
        "user.empty": {},
        "commit": "abc",
        "world_size": 4,
        "versions.torch": "2.9",
    }


def test_only_what_differs_is_told_the_trainings_first_and_places_last(make: Make) -> None:
    one = make({"lr": 0.1, "b": 1, "output_dir": "x", "same": [1]}, config={"preset": "full"})
    two = make({"lr": 0.2, "output_dir": "y", "same": [1]}, config={"preset": "fast"}, commit="d")
    assert differences([one, two]) == [
        Difference("user.b", (1, ABSENT)),
        Difference("user.lr", (0.1, 0.2)),
        Difference("commit", ("abc", "d")),
        Difference("preset", ("full", "fast")),
        Difference("user.output_dir", ("x", "y")),
    ]
    assert differences([one]) == differences([one, one]) == differences([]) == []


def test_absent_is_not_none_and_true_is_not_1_but_1_is_1_0(make: Make) -> None:
    found = differences(
        [
            make({"a": None, "b": True, "c": 1, "d": [1, {"x": 2.0}], "e": "absent"}),
            make({"b": 1, "c": 1.0, "d": [1.0, {"x": 2}]}),
        ]
    )
    assert [(one.key, one.values) for one in found] == [
        ("user.a", (None, ABSENT)),
        ("user.b", (True, 1)),
        ("user.e", ("absent", ABSENT)),
    ]
    assert str(ABSENT) == "absent"
    assert copy.deepcopy(ABSENT) is ABSENT


def test_runs_that_differ_by_seed_and_place_are_one_group(make: Make) -> None:
    runs = [
        make({"lr": lr, "nested": {"data_seed": seed}, "run_name": f"{lr} {seed}"})
        for seed in (1, 2)
        for lr in (0.1, 0.01)
    ]
    assert seed_groups(runs) == [
        Group("lr=0.1", (0, 2), (1, 2)),
        Group("lr=0.01", (1, 3), (1, 2)),
    ]
    assert seed_groups([]) == []


def test_of_several_seeds_the_one_that_differs_is_told(make: Make) -> None:
    runs = [make({"seed": 0, "data_seed": seed}) for seed in (5, 6)]
    assert seed_groups(runs)[0].seeds == (5, 6)
    assert seed_groups([make({"data_seed": 5, "seed": 0})])[0].seeds == (0,)
    assert seed_groups([make({"lr": 0.1})])[0].seeds == (ABSENT,)


def test_a_label_tells_groups_apart_in_few_settings(make: Make) -> None:
    def run(**more: Any) -> Run:
        return make({"a": 1, "opt": {"name": "adam"}, "net": {"name": "llama"}, **more})

    runs = [run(), run(opt={"name": "sgd"}), run(net={"name": "qwen"}), run(a=2)]
    labels = [group.label for group in seed_groups(runs)]
    assert labels[0] == "a=1, net.name=llama, opt.name=adam"
    assert len(set(labels)) == 4
    wide = [make({f"k{at}": at == which for at in range(6)}) for which in range(6)]
    assert len({group.label for group in seed_groups(wide)}) == 6
    lacks = seed_groups([make({"lr": 1, "wd": 0.1}), make({"lr": 1})])
    assert [group.label for group in lacks] == ["wd=0.1", "wd=absent"]


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["sft-seed1", "sft-seed2"], "sft"),
        (["sft_s10", "sft_s11"], "sft"),
        (["gpt2-a", "gpt2-b"], "gpt2"),
        (["class-1", "class-2"], "class"),
        (["same", "same"], "same"),
        (["1", "2"], "1 and 1 more"),
    ],
)
def test_a_single_group_is_called_what_its_runs_names_begin_with(
    make: Make, names: list[str], stem: str
) -> None:
    runs = [make({"seed": seed}, name) for seed, name in enumerate(names)]
    assert seed_groups(runs) == [Group(stem, (0, 1), (0, 1))]


def test_runs_without_settings_are_each_their_own_group(make: Make) -> None:
    runs = [make(None, "x"), make({}, "x"), make({"lr": 1}, "y"), make({"lr": 2}, "z")]
    assert [(group.label, group.members) for group in seed_groups(runs)] == [
        ("x", (0,)),
        ("x (2)", (1,)),
        ("lr=1", (2,)),
        ("lr=2", (3,)),
    ]


def test_another_model_is_another_group_and_another_monitor_is_not(make: Make) -> None:
    runs = [make({"lr": 1}, config={"parameters": n, "preset": n}) for n in (10, 20)]
    assert [group.label for group in seed_groups(runs)] == ["parameters=10", "parameters=20"]
    runs = [make({"lr": 1}, config={"preset": n}) for n in ("full", "fast")]
    assert len(seed_groups(runs)) == 1


# -- values --------------------------------------------------------------------------------------


def test_a_label_that_looks_numbered_is_given_once(make: Make) -> None:
    runs = [make(name=name) for name in ("a", "a", "a (2)", "a")]
    labels = [group.label for group in seed_groups(runs)]
    assert labels == ["a", "a (3)", "a (2)", "a (4)"]
