import csv
import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from entropylens import checkpoints, spectra
from entropylens.checkpoints import open_checkpoint
from entropylens.cli import app
from entropylens.spectra import in_brief, in_order, spectra_of


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["spectra", *(str(argument) for argument in arguments)])


def document(*arguments: str | Path) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows_of(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document(*arguments)["rows"]}


def error(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    return str(result.stderr)


def weights(seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn)

    return {
        "blocks.0.q.weight": random(12, 12),
        "blocks.0.k.weight": random(4, 12),
        "blocks.0.norm.weight": random(12),
        "stem.weight": random(16, 8, 3, 3),
        "blocks.0.experts.up": random(2, 6, 12),
    }


def expected(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Singular values by numpy, of what each matrix should be."""
    flat = {name: value.double().numpy() for name, value in state.items()}
    matrices = {
        "blocks.0.q.weight": flat["blocks.0.q.weight"],
        "blocks.0.k.weight": flat["blocks.0.k.weight"],
        "stem.weight": flat["stem.weight"].reshape(16, 72),
        "blocks.0.experts.up[0]": flat["blocks.0.experts.up"][0],
        "blocks.0.experts.up[1]": flat["blocks.0.experts.up"][1],
    }
    return {name: np.linalg.svd(value, compute_uv=False) for name, value in matrices.items()}


def assert_agree(found: Mapping[str, Mapping[str, Any]], state: Mapping[str, Tensor]) -> None:
    wanted = expected(state)
    assert found.keys() == wanted.keys()
    for name, sigma in wanted.items():
        row, square = found[name], (sigma**2).sum()
        share = sigma / sigma.sum()
        deficit = len(sigma) / 2 * np.log(square / len(sigma)) - np.log(sigma).sum()
        by_hand = {
            "kappa": sigma[0] / sigma[-1],
            "sigma_max": sigma[0],
            "sigma_min": sigma[-1],
            "stable_rank": square / sigma[0] ** 2,
            "effective_rank": np.exp(-(share * np.log(share)).sum()),
            "entropy_deficit": deficit,
            "log_volume": np.log(sigma).sum(),
            "full_rank": len(sigma),
        }
        assert {key: row[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-6)
        assert row["kappa_to_null"] == pytest.approx(row["kappa"] / row["null_kappa"])
        assert row["kappa_floor"] is None


# -- kinds of checkpoints -------------------------------------------------------------------------


def save_legacy(state: Mapping[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "kind", ["whole", "lightning", "nested", "deepspeed", "parameters", "legacy"]
)
@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pytorch_file_gives_the_singular_values_of_numpy(
    tmp_path: Path, kind: str, ending: str
) -> None:
    state, path = weights(), tmp_path / f"model{ending}"
    if kind == "legacy":
        save_legacy(state, path)
    else:
        saved = {
            "whole": state,
            "lightning": {"epoch": 3, "state_dict": state, "optimizer_states": [{"lr": 0.1}]},
            "deepspeed": {"module": state, "global_steps": 7},
            "nested": {"model": {"state_dict": state}, "step": 7},
            "parameters": {name: nn.Parameter(value) for name, value in state.items()},
        }
        torch.save(saved[kind], path)
    assert_agree(rows_of(path), state)


def test_a_safetensors_file_gives_the_singular_values_of_numpy(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    assert_agree(rows_of(tmp_path / "model.safetensors"), weights())
    (tmp_path / "config.json").write_text("{}")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    assert_agree(rows_of(tmp_path), weights())


def shards(folder: Path, ending: str, index: str | None) -> None:
    names = sorted(weights())
    where = {name: f"{ending.split('.')[0]}-{at % 2}.{ending.split('.')[1]}" for at, name in
             enumerate(names)}  # fmt: skip
    for file in sorted(set(where.values())):
        part = {name: weights()[name] for name in names if where[name] == file}
        if file.endswith("safetensors"):
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    if index is not None:
        (folder / index).write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(
    ("ending", "index"),
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.safetensors", None),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ("pytorch_model.bin", None),
    ],
)
def test_the_shards_of_a_folder_are_one_checkpoint(
    tmp_path: Path, ending: str, index: str | None
) -> None:
    shards(tmp_path, ending, index)
    assert_agree(rows_of(tmp_path), weights())


def test_an_index_decides_over_other_files_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path, "model.safetensors", "model.safetensors.index.json")
    save_file({"other.weight": torch.eye(3)}, tmp_path / "consolidated.safetensors")
    assert_agree(rows_of(tmp_path), weights())
    (tmp_path / "model-1.safetensors").unlink()
    message = f"expected {tmp_path}/model-1.safetensors, which model.safetensors.index.json names"
    assert message in error(tmp_path)


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        ({"metadata": {}}, "expected a weight_map by tensor name in "),
        ({"weight_map": ["a"]}, "expected a weight_map by tensor name in "),
        ([1, 2], "got a list"),
        ({"weight_map": {"a": 1}}, "got 1"),
        ({"weight_map": {"a": None}}, "got None"),
        ({"weight_map": {"a": "../model-0.safetensors"}}, "got '../model-0.safetensors'"),
        ({"weight_map": {"a": "/model-0.safetensors"}}, "got '/model-0.safetensors'"),
        ({"weight_map": {"a": "..\\model"}}, "expected names of files beside it in "),
        ({"weight_map": {"a": ".."}}, "which model.safetensors.index.json names"),
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(
    tmp_path: Path, index: Any, wanted: str
) -> None:
    shards(tmp_path, "model.safetensors", None)
    folder = tmp_path / "within"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = error(folder)
    assert wanted in said
    assert "model.safetensors.index.json" in said


def test_values_are_read_when_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    alive = 0
    names: list[str] = []
    read = type(opened.tensors).__getitem__

    def counted(self: Any, name: str) -> Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(checkpoints._Lazy, "__getitem__", counted)
    groups = opened.groups()
    assert names == []
    opened.matrices(groups[alive])
    assert {*names} == {groups[0][0]}


# -- adapters -------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 10)
        self.first = nn.Linear(10, 14)
        self.second = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.table(x)))


def adapter(folder: Path, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """An adapter that PEFT saved, its base beside it, and the base with the adapter merged in."""
    model = Small()
    save_file(model.state_dict(), folder / "base.safetensors")
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["table", "first", "second"], **settings)
    adapted: Any = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    return Small(), adapted.merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"first": 5.0}, "rank_pattern": {"first": 2}}],
)
def test_an_adapter_shows_its_product_with_its_scale_and_its_sum_with_the_base(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    before, after = adapter(tmp_path, **settings)
    found = rows_of(tmp_path / "adapter", "--base", tmp_path / "base.safetensors")
    modules = ("table", "first", "second")
    products = {f"base_model.model.{name}.lora" for name in modules}
    assert found.keys() == products | {f"base_model.model.{name}+lora" for name in modules}
    for name in modules:
        old, new = (dict(model.named_parameters())[f"{name}.weight"] for model in (before, after))
        rank = 2 if name == "first" and "rank_pattern" in settings else 3
        of_change = np.linalg.svd((new - old).detach().double().numpy(), compute_uv=False)
        of_sum = torch.linalg.svdvals(new.detach().double())
        product = found[f"base_model.model.{name}.lora"]
        total = found[f"base_model.model.{name}+lora"]
        assert product["sigma_max"] == pytest.approx(of_change[0], rel=1e-4)
        assert product["kappa"] == pytest.approx(of_change[0] / of_change[rank - 1], rel=1e-3)
        assert product["full_rank"] == rank
        assert product["kappa_to_null"] is product["entropy_deficit_to_null"] is None
        assert product["outliers"] is None
        assert total["kappa"] == pytest.approx(float(of_sum[0] / of_sum[-1]), rel=1e-4)
        assert total["sigma_max"] == pytest.approx(float(of_sum[0]), rel=1e-5)
    alone = rows_of(tmp_path / "adapter")
    assert alone.keys() == products
    assert alone == {name: found[name] for name in products}
    assert alone == rows_of(tmp_path / "adapter" / "adapter_model.safetensors")


def test_without_its_settings_a_product_has_no_scale(tmp_path: Path) -> None:
    adapter(tmp_path)
    held = tmp_path / "adapter" / "adapter_model.safetensors"
    scaled = rows_of(held)
    held.rename(tmp_path / "found.safetensors")
    bare = rows_of(tmp_path / "found.safetensors")
    for name, row in bare.items():
        assert row["sigma_max"] is row["sigma_min"] is row["log_volume"] is None
        assert row["kappa"] == pytest.approx(scaled[name]["kappa"], rel=1e-5)


def test_a_base_is_found_under_one_prefix_less_or_more_and_else_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    state = Small().state_dict()
    wanted = rows_of(tmp_path / "adapter", "--base", tmp_path / "base.safetensors")
    longer = {f"model.{name}": value for name, value in state.items()}
    save_file(longer, tmp_path / "longer.safetensors")
    assert rows_of(tmp_path / "adapter", "--base", tmp_path / "longer.safetensors") == wanted
    del state["first.weight"]
    state["second.weight"] = torch.zeros(10, 14, dtype=torch.int8)
    torch.save(state, tmp_path / "poor.pt")
    found = document("--base", tmp_path / "poor.pt", tmp_path / "adapter")
    assert found["refused"] == {
        "base_model.model.first+lora": "the base has no first.weight",
        "base_model.model.second+lora": "of its base: it is quantised (int8)",
    }
    assert "base_model.model.table+lora" in {row["name"] for row in found["rows"]}


def test_transposed_and_scaled_sums_are_known_by_the_settings(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(3)
    weight, inner = (torch.randn(*s, generator=drawn) for s in ((8, 8), (2, 8)))
    outer = torch.randn(8, 2, generator=drawn)
    save_file({"h.0.c.weight": weight}, tmp_path / "base.safetensors")
    place = "base_model.model.transformer.h.0.c"
    held = {f"{place}.lora_A.weight": inner, f"{place}.lora_B.weight": outer}
    (tmp_path / "adapter").mkdir()
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 4, "fan_in_fan_out": True}
    written = tmp_path / "adapter" / "adapter_config.json"
    written.write_text(json.dumps(config))
    both = (tmp_path / "adapter", "--base", tmp_path / "base.safetensors")
    total = torch.linalg.svdvals((weight + 2 * (outer @ inner).T).double())
    assert rows_of(*both)[f"{place}+lora"]["kappa"] == pytest.approx(
        float(total[0] / total[-1]), rel=1e-5
    )
    written.write_text(json.dumps(config | {"use_dora": True}))
    refused = document(*both)["refused"]
    assert refused == {f"{place}+lora": "the adapter has learnt magnitudes (DoRA)"}
    written.write_text(json.dumps(config | {"peft_type": "LOHA"}))
    assert f"expected a LoRA adapter, {written} is of a LOHA" in error(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lora_alpha": None}, "expected a number as lora_alpha in "),
        ({"lora_alpha": "8"}, "got '8'"),
        ({"alpha_pattern": ["q"]}, "expected alpha_pattern as an object in "),
        ({"alpha_pattern": {"q(": 4}}, "expected regular expressions in alpha_pattern of "),
        ({"alpha_pattern": {"q": "four"}}, "expected a number as alpha_pattern 'q' in "),
    ],
)
def test_settings_of_an_adapter_that_tell_no_scale_are_one_line(
    tmp_path: Path, settings: dict[str, Any], wanted: str
) -> None:
    adapter(tmp_path)
    written = tmp_path / "adapter" / "adapter_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | settings))
    said = error(tmp_path / "adapter")
    assert wanted in said
    assert str(written) in said


def test_factors_that_fit_neither_each_other_nor_the_base_are_refused_and_the_rest_shown(
    tmp_path: Path,
) -> None:
    shapes = {
        "good": ((2, 8), (6, 2)),
        "wide": ((2, 9), (6, 2)),
        "apart": ((2, 8), (6, 3)),
        "flat": ((16,), (6, 2)),
        "empty": ((0, 8), (6, 0)),
        "conv": ((2, 2, 2, 2), (6, 2, 1, 1)),
    }
    drawn = torch.Generator().manual_seed(0)
    held = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(*shape, generator=drawn)
        for name, both in shapes.items()
        for side, shape in zip("AB", both, strict=True)
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    base = {f"{name}.weight": torch.randn(6, 8, generator=drawn) for name in shapes}
    base["conv.weight"] = base["conv.weight"].reshape(6, 2, 2, 2).contiguous()
    save_file(base, tmp_path / "base.safetensors")
    found = document(folder, "--base", tmp_path / "base.safetensors")
    whole = ("good.lora", "good+lora", "conv.lora", "conv+lora", "wide.lora")
    assert {row["name"] for row in found["rows"]} == {f"base_model.model.{one}" for one in whole}
    assert found["refused"] == {
        "base_model.model.wide+lora": "its base is of 6x8, the product of 6x9",
        "base_model.model.apart.lora_A.weight": "6x3 and 2x8 have no product",
        "base_model.model.flat.lora_A.weight": "6x2 and 16 have no product",
        "base_model.model.empty.lora_A.weight": "6x0 and 0x8 have no product",
    }


# -- what cannot be read --------------------------------------------------------------------------


def test_what_is_quantised_is_refused_by_name_and_its_scales_are_no_matrices(
    tmp_path: Path,
) -> None:
    eight, four = torch.ones(8, 8, dtype=torch.int8), torch.ones(32, 1, dtype=torch.uint8)
    ones = torch.ones(8, 8)
    state = {
        "plain.weight": torch.eye(8) + 0.1,
        "plain.scales": torch.eye(3) * 2,
        "bnb8.weight": eight,
        "bnb8.SCB": torch.ones(8),
        "bnb4.weight": four,
        "bnb4.weight.absmax": torch.ones(4),
        "bnb4.weight.quant_map": torch.ones(16),
        "bnb4.weight.quant_state.bitsandbytes__nf4": torch.ones(80, dtype=torch.uint8),
        "gptq.qweight": torch.ones(8, 8, dtype=torch.int32),
        "gptq.scales": ones.clone(),
        "gptq.qzeros": torch.ones(2, 8, dtype=torch.int32),
        "gptq.g_idx": torch.ones(8, dtype=torch.int32),
        "eight.weight": ones.to(torch.float8_e4m3fn),
        "eight.weight_scale_inv": ones.clone(),
        "packed.weight_packed": torch.ones(8, 2, dtype=torch.int32),
        "packed.weight_scale": ones.clone(),
        "experts.up_blocks": torch.ones(2, 8, 4, dtype=torch.uint8),
        "experts.up_scales": torch.ones(2, 8, dtype=torch.uint8),
        "mask": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "ids": torch.ones(4, 4, dtype=torch.int64),
        "ids.short": torch.ones(4, dtype=torch.int64),
        "bad.weight": torch.full((3, 3), torch.nan),
        "zero.weight": torch.zeros(3, 3),
        "alone.lora_A.weight": torch.ones(2, 4),
    }
    save_file(state, tmp_path / "model.safetensors")
    found = document(tmp_path)
    assert {row["name"] for row in found["rows"]} == {"plain.weight", "plain.scales"}
    assert found["refused"] == {
        "bnb8.weight": "it is quantised (int8)",
        "bnb4.weight": "it is quantised (packed by bitsandbytes)",
        "gptq.qweight": "it is quantised (int32)",
        "eight.weight": "it is quantised (float8_e4m3fn)",
        "packed.weight_packed": "it is quantised (int32)",
        "experts.up_blocks": "it is quantised (uint8)",
        "mask": "it holds no weights (bool)",
        "ids": "it holds no weights (int64)",
        "bad.weight": "it holds NaN or infinity, or only zeros",
        "zero.weight": "it holds NaN or infinity, or only zeros",
        "alone.lora_A.weight": "its other factor is missing",
    }
    shown = invoke(tmp_path).stdout
    table, _, below = shown.partition("\n\n")
    assert table.startswith("name\trows\t")
    assert below.startswith("refused\treason\n")
    assert "bnb4.weight\tit is quantised (packed by bitsandbytes)\n" in below
    only = document(tmp_path, "--only", "bnb*")
    assert (only["rows"], [*only["refused"]]) == ([], ["bnb4.weight", "bnb8.weight"])


def test_a_tensor_without_values_is_refused(tmp_path: Path) -> None:
    state = {"a.weight": torch.eye(3), "b.weight": torch.empty(3, 3, device="meta")}
    torch.save(state, tmp_path / "model.pt")
    opened = open_checkpoint(tmp_path / "model.pt")
    meta = {**opened.tensors, "b.weight": state["b.weight"]}
    rows, refused = spectra_of(checkpoints.Checkpoint(tensors=meta))
    assert [row["name"] for row in rows] == ["a.weight"]
    assert refused == {"b.weight": "it is on the meta device, without values"}


def test_a_sparse_tensor_is_refused_by_name(tmp_path: Path) -> None:
    state = {"a.weight": torch.eye(3), "b.weight": torch.eye(3).to_sparse()}
    torch.save(state, tmp_path / "model.pt")
    found = document(tmp_path / "model.pt")
    assert [row["name"] for row in found["rows"]] == ["a.weight"]
    assert found["refused"] == {"b.weight": "it is sparse (sparse_coo)"}


@pytest.mark.parametrize("kind", [AssertionError, IndexError, TypeError, RuntimeError])
def test_whatever_a_damaged_pickle_raises_is_one_line_without_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise kind("Re-running `torch.load` with `weights_only` set to `False` will likely succeed")

    path = tmp_path / "model.pt"
    torch.save(weights(), path)
    monkeypatch.setattr(torch, "load", fails)
    wanted = f"expected a PyTorch file, {path} is none, or damaged ({kind.__name__})"
    assert error(path) == f"error: spectra: {wanted}\n"


class Strange:
    pass


def test_a_pickle_that_could_run_code_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.eye(3), "args": Strange()}, path)
    said = error(path)
    assert f"expected {path} to hold tensors alone, but it holds " in said
    assert "Strange, which could run code; save the model's state_dict" in said
    torch.save(nn.Linear(3, 3), path)
    assert "but it holds torch.nn.modules.linear.Linear, which could run code" in error(path)


def test_what_is_no_checkpoint_is_one_line_that_names_it(tmp_path: Path) -> None:
    assert f"expected a checkpoint at {tmp_path / 'x.pt'}, found nothing" in error(
        tmp_path / "x.pt"
    )
    assert f"expected the files of one model in {tmp_path}, found none" in error(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    kinds = "(.safetensors, .pt, .pth, .bin, .ckpt)"
    wanted = f"expected a checkpoint {kinds}, got {tmp_path / 'notes.txt'}"
    assert wanted in error(tmp_path / "notes.txt")
    for name, content in (("a.pt", b"hello"), ("b.pt", b""), ("c.pt", b"PK\x03\x04 broken")):
        (tmp_path / name).write_bytes(content)
        said = error(tmp_path / name)
        assert f"expected a PyTorch file, {tmp_path / name} is none, or damaged (" in said
        assert "weights_only" not in said
    assert "found a.pt, b.pt, c.pt" in error(tmp_path)
    broken = tmp_path / "d.safetensors"
    broken.write_bytes(struct.pack("<Q", 5) + b"hello")
    assert f"expected safetensors in {broken}, got: " in error(broken)


def test_a_file_without_matrices_or_with_other_things_says_so(tmp_path: Path) -> None:
    torch.save([torch.eye(3)], tmp_path / "list.pt")
    assert f"expected a state_dict in {tmp_path / 'list.pt'}, got a list" in error(
        tmp_path / "list.pt"
    )
    torch.save({"epoch": 3}, tmp_path / "few.pt")
    assert f"expected tensors in {tmp_path / 'few.pt'}, found none under its keys (epoch)" in error(
        tmp_path / "few.pt"
    )
    torch.save({"net": weights(), **{f"key{at}": at for at in range(20)}}, tmp_path / "net.pt")
    assert "its keys (net, key0, key1, " in error(tmp_path / "net.pt")
    assert "key10); save the model's state_dict" in error(tmp_path / "net.pt")
    torch.save({"norm": torch.ones(3)}, tmp_path / "norm.pt")
    assert document(tmp_path / "norm.pt")["rows"] == []
    assert invoke(tmp_path / "norm.pt").stdout == "no matrices\n"


def test_folders_that_are_no_one_model_say_what_to_do(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"weight": torch.eye(3)}, tmp_path / f"{name}.safetensors")
    assert "found weight again in b.safetensors; name one file" in error(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / ".metadata").write_bytes(b"")
    (shared / "__0_0.distcp").write_bytes(b"")
    assert "is a distributed checkpoint; python -m torch.distributed" in error(shared)
    (shared / "adapter_config.json").write_text("{")
    assert f"expected JSON in {shared / 'adapter_config.json'}, got " in error(shared)


def test_missing_packages_and_misused_options_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    assert "expected an adapter with --base, found no " in error(path, "--base", path)
    known = "(deficit, kappa, kappa-to-null, name)"
    wanted = f"expected a sort key {known}, got 'kapa'; did you mean 'kappa'?"
    assert wanted in error(path, "--sort", "kapa")
    assert "expected a matrix that matches ['z*'], found none" in error(path, "--only", "z*")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert f"installed to read {path}, found none; pip install 'entropylens[hf]'" in error(path)


def test_without_torch_the_verb_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "entropylens.checkpoints")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "expected torch to be installed, got none; pip install" in error(tmp_path)


# -- what is shown --------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A worn square matrix, a fresh flat one, an orthogonal one, and one of rank 2 in bfloat16."""
    drawn = torch.Generator().manual_seed(0)
    signs = torch.randn(2, 32, generator=drawn).sign()
    worn = torch.randn(32, 32, generator=drawn) + 30 / 32 * signs[0].outer(signs[1])
    state = {
        "worn": worn,
        "flat": torch.randn(8, 64, generator=drawn),
        "even": torch.linalg.qr(torch.randn(16, 16, generator=drawn))[0].contiguous(),
        "thin": (torch.randn(16, 2, generator=drawn) @ torch.randn(2, 16, generator=drawn)).to(
            torch.bfloat16
        ),
    }
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_orders_put_the_worst_first_and_a_limit_says_how_much_it_leaves_out(model: Path) -> None:
    def order(*options: str) -> list[str]:
        return [row["name"] for row in document(model, *options)["rows"]]

    assert order() == ["thin", "worn", "flat", "even"]
    assert order("--sort", "name") == ["even", "flat", "thin", "worn"]
    by = {name: row["kappa"] or row["kappa_floor"] for name, row in rows_of(model).items()}
    assert order("--sort", "kappa") == sorted(by, key=by.__getitem__, reverse=True)
    null = {name: by[name] / row["null_kappa"] for name, row in rows_of(model).items()}
    assert order("--sort", "kappa-to-null") == sorted(null, key=null.__getitem__, reverse=True)
    limited = document(model, "--limit", "1", "--sort", "name")
    assert ([row["name"] for row in limited["rows"]], limited["omitted"]) == (["even"], 3)
    assert order("--only", "w*", "--only", "even") == ["worn", "even"]


def test_what_storage_hides_is_a_floor_and_not_a_number(model: Path) -> None:
    thin = rows_of(model)["thin"]
    assert thin["kappa"] is thin["kappa_to_null"] is thin["sigma_min"] is None
    assert thin["entropy_deficit"] is thin["log_volume"] is None
    assert thin["kappa_floor"] > 20
    assert thin["stored"] == "bfloat16"
    cells = in_brief(thin)
    assert cells["kappa"].startswith(">")
    assert cells["kappa/null"].startswith(">")
    assert cells["shape"] == "16x16"
    assert cells["rank"].endswith("/16")


def test_the_permuted_null_keeps_the_entries_and_loses_the_structure(model: Path) -> None:
    found = rows_of(model, "--permuted")
    worn = found["worn"]
    assert worn["outliers"] == worn["above_permuted"] == 1
    assert worn["permuted_sigma_max"] < worn["sigma_max"] / 2
    assert abs(worn["permuted_deficit_to_null"]) < worn["entropy_deficit_to_null"]
    assert found["flat"]["above_permuted"] <= 1
    assert found == rows_of(model, "--permuted")
    plain = rows_of(model)
    assert all(plain[name].items() <= row.items() for name, row in found.items())
    assert {"permuted deficit", "permuted kappa", "above permuted"} <= in_brief(worn).keys()


def test_a_fresh_matrix_is_near_its_null_and_an_orthogonal_one_below() -> None:
    drawn = torch.Generator().manual_seed(5)
    fresh = {f"{at}": torch.randn(48, 96, generator=drawn) for at in range(8)}
    fresh["even"] = torch.linalg.qr(torch.randn(96, 48, generator=drawn))[0]
    rows, _ = spectra_of(checkpoints.Checkpoint(tensors=fresh))
    by = {row["name"]: row for row in rows}
    even = by.pop("even")
    assert even["kappa"] == pytest.approx(1, abs=1e-5)
    assert even["entropy_deficit"] == pytest.approx(0, abs=1e-6)
    assert even["entropy_deficit_to_null"] < -1
    deficits = [row["entropy_deficit_to_null"] for row in by.values()]
    assert np.mean(deficits) == pytest.approx(0, abs=3 * np.std(deficits) / np.sqrt(8))
    assert np.mean([np.log(row["kappa_to_null"]) for row in by.values()]) == pytest.approx(
        0, abs=0.1
    )


def test_the_file_holds_every_digit_and_is_not_replaced_unasked(model: Path) -> None:
    out = model.parent / "rows.csv"
    said = document(model, "--output", out, "--sort", "name")
    assert (said["file"], said["rows"], said["refused"]) == (str(out), 4, {})
    with open(out, newline="") as file:
        written = {row["name"]: row for row in csv.DictReader(file)}
    for name, row in rows_of(model).items():
        for key, value in row.items():
            assert written[name][key] == ("" if value is None else written[name][key])
            if isinstance(value, float):
                assert float(written[name][key]) == value
    assert f"expected {out} to be free, got a file; use --force" in error(model, "-o", out)
    done = invoke(model, "-o", out, "--force", "--limit", "2")
    assert done.stdout == f"{out}: 2 matrices\n"
    assert len(out.read_text().splitlines()) == 3


def test_what_is_not_a_number_is_unknown_in_every_form(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = torch.tensor(torch.nan)
    law = SimpleNamespace(variance=nan, distance=nan, outliers=nan)
    monkeypatch.setattr(spectra, "marchenko_pastur", lambda *_, **__: law)
    row = rows_of(model)["worn"]
    assert row["marchenko_pastur_distance"] is row["outliers"] is None
    document(model, "-o", model.parent / "rows.csv")
    with open(model.parent / "rows.csv", newline="") as file:
        written = next(csv.DictReader(file))
    assert written["marchenko_pastur_distance"] == written["outliers"] == ""


def test_a_file_that_cannot_be_written_is_known_before_anything_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    wanted = f"expected a folder for --output at {missing}, found none; make it first"
    assert wanted in error(tmp_path / "absent.pt", "-o", missing / "rows.csv")
    wanted = f"expected a file as --output, got the folder {tmp_path}; name one"
    assert wanted in error(tmp_path / "absent.pt", "-o", tmp_path, "--force")


def test_a_written_file_does_not_silence_what_was_refused(model: Path) -> None:
    torch.save({"a": torch.eye(3), "b": torch.zeros(3, 3)}, model.parent / "two.pt")
    done = invoke(model.parent / "two.pt", "-o", model.parent / "two.csv")
    assert done.stderr == "refused: b: it holds NaN or infinity, or only zeros\n"


def test_rows_without_a_number_come_last() -> None:
    known = {"null_kappa": 2.0, "kappa_floor": None}
    rows = [
        {"name": "c", "kappa": None, "kappa_to_null": None, **known},
        {"name": "b", "kappa": 5.0, "kappa_to_null": 2.5, **known},
        {"name": "a", "kappa": 5.0, "kappa_to_null": 2.5, **known},
        {"name": "d", "kappa": None, "kappa_to_null": None, "null_kappa": 2.0, "kappa_floor": 9.0},
    ]
    for sort in ("kappa", "kappa-to-null"):
        assert [row["name"] for row in in_order(rows, sort)] == ["d", "a", "b", "c"]
