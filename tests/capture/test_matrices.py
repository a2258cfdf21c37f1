import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from entropylens.capture.matrices import MatrixSet, matrices_in, matrices_of


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))


class Odd(nn.Module):
    """Everything that could be taken for a matrix and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 7, 5))
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.row = nn.Parameter(torch.randn(1, 5))
        self.scale = nn.Parameter(torch.randn(5))


def shapes(found: MatrixSet) -> dict[str, tuple[int, int]]:
    for matrix in found.matrices:
        assert tuple(matrix.read().shape) == matrix.shape
        assert not matrix.read().requires_grad
    return {matrix.name: matrix.shape for matrix in found.matrices}


def test_convolutions_are_flattened_and_experts_taken_apart() -> None:
    convolution, experts = nn.Conv2d(8, 16, 3), Experts()
    model = nn.ModuleDict({"conv": convolution, "line": nn.Conv1d(4, 6, 2), "experts": experts,
                           "odd": Odd(), "flat": nn.Linear(5, 3)})  # fmt: skip
    assert shapes(matrices_of(model)) == {
        "conv.weight": (16, 72),
        "line.weight": (6, 8),
        "experts.gate_up_proj[0]": (8, 6),
        "experts.gate_up_proj[1]": (8, 6),
        "experts.gate_up_proj[2]": (8, 6),
        "odd.positions": (7, 5),
        "flat.weight": (3, 5),
    }
    by_name = {matrix.name: matrix for matrix in matrices_of(model).matrices}
    assert torch.equal(by_name["experts.gate_up_proj[1]"].read(), experts.gate_up_proj[1])
    assert torch.equal(by_name["conv.weight"].read()[3, 9:18].view(3, 3),
                       convolution.weight[3, 1])  # fmt: skip


def test_a_matrix_is_read_as_it_is_when_it_is_asked_for() -> None:
    model = nn.Linear(4, 4)
    (matrix,) = matrices_of(model).matrices
    with torch.no_grad():
        model.weight.zero_()
    assert not matrix.read().any()


def test_shared_parameters_stand_once_and_frozen_ones_may_be_left_out() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    assert list(shapes(matrices_of(model))) == ["embed.weight"]
    model["embed"].weight.requires_grad_(False)
    assert not matrices_of(model, trained=True).matrices


def test_what_cannot_be_read_is_refused_by_name() -> None:
    model = nn.ModuleDict({"meta": nn.Linear(3, 3, device="meta"), "lazy": nn.LazyLinear(3),
                           "complex": nn.Linear(3, 3, dtype=torch.complex64)})  # fmt: skip
    model["whole"] = nn.Linear(3, 3)
    model["whole"].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    model["small"] = nn.Linear(3, 3)
    model["small"].weight = nn.Parameter(torch.ones(3, 3).to(torch.float8_e4m3fn), False)
    assert matrices_of(model).refused == {
        "meta.weight": "it is on the meta device, without values",
        "lazy.weight": "it has no values before the first forward",
        "lazy.bias": "it has no values before the first forward",
        "complex.weight": "it is complex",
        "whole.weight": "it is quantised (int8)",
        "small.weight": "it is quantised (float8_e4m3fn)",
    }


def test_a_sharded_parameter_is_refused(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/ranks")
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        assert matrices_of(model).refused == {"weight": "it is sharded over ranks"}
    finally:
        destroy_process_group()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_stands_by_its_outputs(groups: int) -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, groups=groups, bias=False)
    (matrix,) = matrices_of(layer).matrices
    assert shapes(matrices_of(layer)) == {"weight": (4, 6 // groups * 9)}
    # An impulse at an input shows the kernels that lead from it to each output.
    for channel in range(6):
        impulse = torch.zeros(1, 6, 1, 1)
        impulse[0, channel] = 1.0
        group, at = divmod(channel, 6 // groups)
        kernels = layer(impulse)[0].flatten(1)
        outputs = slice(group * 4 // groups, (group + 1) * 4 // groups)
        torch.testing.assert_close(matrix.read()[outputs, 9 * at : 9 * at + 9], kernels[outputs])


def test_a_transposed_convolution_of_one_output_is_a_row() -> None:
    assert not matrices_of(nn.ConvTranspose1d(6, 1, 3)).matrices


def test_what_a_state_dict_holds_of_a_transposed_convolution_lies_as_it_is_stored() -> None:
    layer = nn.ConvTranspose1d(6, 4, 3, bias=False)
    assert shapes(matrices_in(layer.state_dict())) == {"weight": (6, 12)}


def test_a_parameter_that_was_replaced_is_read_anew_and_not_kept_alive() -> None:
    model = nn.ModuleDict({"line": nn.Linear(4, 3), "experts": Experts(),
                           "back": nn.ConvTranspose1d(4, 3, 2)})  # fmt: skip
    found = {matrix.name: matrix for matrix in matrices_of(model).matrices}
    old = [weakref.ref(parameter) for parameter in model.parameters() if parameter.ndim > 1]
    for module in model.values():
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(torch.full_like(parameter, 7.0)))
        del parameter
    gc.collect()
    assert [reference() for reference in old] == [None, None, None]
    assert len(found) == 5
    assert all((matrix.read() == 7.0).all() for matrix in found.values())


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_names_are_those_within_what_wraps_the_model(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    found = matrices_of(wrap(model))
    assert list(shapes(found)) == ["0.weight"]
    assert list(found.refused) == ["1.weight"]


def test_packed_codes_are_refused_whatever_their_shape() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counts = nn.Parameter(torch.ones(6, 1, dtype=torch.uint8), requires_grad=False)

    model = nn.ModuleDict({"packed": nn.Linear(3, 4), "scalar": nn.Linear(3, 4),
                           "other": Counting()})  # fmt: skip
    model["packed"].weight = nn.Parameter(torch.ones(6, 1, dtype=torch.uint8), False)
    model["scalar"].weight = nn.Parameter(torch.ones(1, 1, dtype=torch.uint8), False)
    assert matrices_of(model).refused == {"packed.weight": "it is quantised (uint8)"}


def test_factors_that_are_not_pefts_are_matrices_of_their_own() -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))
            self.lora_A = nn.Parameter(torch.randn(2, 6))
            self.lora_B = nn.Parameter(torch.randn(5, 2))

    found = matrices_of(nn.Sequential(Low()))
    assert shapes(found) == {"0.weight": (5, 6), "0.lora_A": (2, 6), "0.lora_B": (5, 2)}


@pytest.fixture
def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(5, 4, 3), nn.Embedding(7, 3))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "2"])
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora" in name:
                parameter.normal_()
    return found


def test_an_adapter_stands_as_its_product_and_as_the_sum_with_its_base(adapted: Any) -> None:
    found = {m.name: m for m in matrices_of(adapted, trained=True).matrices}
    assert {name: m.rank for name, m in found.items()} == {
        "base_model.model.0.lora": 2, "base_model.model.0+lora": None,
        "base_model.model.1.lora": 2, "base_model.model.1+lora": None,
        "base_model.model.2.lora": 2, "base_model.model.2+lora": None,
    }  # fmt: skip
    layer = adapted.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product = 3.0 * b @ a
    torch.testing.assert_close(found["base_model.model.0.lora"].read(), product.detach())
    total = found["base_model.model.0+lora"].read()
    torch.testing.assert_close(total, (layer.base_layer.weight + product).detach())
    convolution = adapted.base_model.model[1]
    a, b = convolution.lora_A["default"].weight, convolution.lora_B["default"].weight
    torch.testing.assert_close(found["base_model.model.1.lora"].read(),
                               3.0 * b.flatten(1).detach() @ a.flatten(1).detach())  # fmt: skip
    assert found["base_model.model.0+lora"].parameters[0] == "base_model.model.0.base_layer.weight"


def test_the_sum_is_the_same_once_the_adapter_is_merged(adapted: Any) -> None:
    before = {m.name: m.read().clone() for m in matrices_of(adapted).matrices}
    adapted.merge_adapter()
    for matrix in matrices_of(adapted).matrices:
        if matrix.name.endswith("+lora"):
            torch.testing.assert_close(matrix.read(), before[matrix.name])


def test_a_state_dict_gives_what_its_names_tell(adapted: Any) -> None:
    others = {"mlp.experts.up": torch.randn(2, 4, 5), "line": torch.randn(4, 5, 2)}
    state = {**adapted.state_dict(), **others}
    found = {m.name: m for m in matrices_in(state, scale=3.0).matrices}
    live = {m.name: m for m in matrices_of(adapted).matrices}
    assert found["line"].shape == (4, 10)
    assert found["mlp.experts.up[1]"].shape == (4, 5)
    for name in ("base_model.model.0.lora", "base_model.model.1.lora"):
        torch.testing.assert_close(found[name].read(), live[name].read())
    torch.testing.assert_close(found["base_model.model.2.lora"].read(),
                               live["base_model.model.2.lora"].read().T)  # fmt: skip
    del state["base_model.model.0.lora_A.default.weight"]
    assert matrices_in(state).refused == {
        "base_model.model.0.lora_B.default.weight": "its other factor is missing"
    }


@pytest.mark.parametrize("scale", [None, 1.0, 0.0])
def test_a_scale_of_nought_is_no_scale_of_one(adapted: Any, scale: float | None) -> None:
    found = {m.name: m for m in matrices_in(adapted.state_dict(), scale=scale).matrices}
    assert bool(found["base_model.model.0.lora"].read().any()) is (scale != 0.0)


def test_an_adapter_that_is_frozen_is_not_trained(adapted: Any) -> None:
    for parameter in adapted.base_model.model[0].parameters():
        parameter.requires_grad_(False)
    adapted.base_model.model[1].lora_A["default"].requires_grad_(False)
    assert [m.name.removeprefix("base_model.model.")
            for m in matrices_of(adapted, trained=True).matrices] == [
        "1.lora", "1+lora", "2.lora", "2+lora"
    ]  # fmt: skip
    assert "base_model.model.0.lora" in {m.name for m in matrices_of(adapted).matrices}


def test_factors_of_an_adapter_at_rest_are_no_matrices(adapted: Any) -> None:
    before = list(shapes(matrices_of(adapted)))
    config = adapted.peft_config["default"]
    adapted.add_adapter("other", config)
    assert list(shapes(matrices_of(adapted))) == before


def test_an_adapter_with_singular_values_of_its_own_stands_as_its_product() -> None:
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(target_modules=["0"], init_r=3, total_step=10)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_E["default"])
    found = {m.name: m for m in matrices_of(model, trained=True).matrices}
    assert shapes(matrices_of(model)) == {
        "base_model.model.0.base_layer.weight": (5, 6),
        "base_model.model.0.lora": (5, 6),
        "base_model.model.0+lora": (5, 6),
    }
    product = found["base_model.model.0.lora"]
    assert product.rank == 3
    assert product.parameters == tuple(
        f"base_model.model.0.lora_{side}.default" for side in ("A", "B", "E")
    )
    assert {*product.parameters} <= {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(product.read(), layer.get_delta_weight("default").detach())
    for side in (layer.lora_A, layer.lora_B):
        side["default"].requires_grad_(False)
    assert len(matrices_of(model, trained=True).matrices) == 2
    layer.lora_E["default"].requires_grad_(False)
    assert not matrices_of(model, trained=True).matrices


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)


def test_an_adapter_of_an_attention_of_pytorch_is_refused_but_for_its_output() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Attending(), peft.LoraConfig(r=2, target_modules=["attention"]))
    found, place = matrices_of(model), "base_model.model.attention"
    assert found.refused == {f"{place}.lora": "it adapts a module that has no weight of that name"}
    assert list(shapes(found)) == [
        f"{place}.base_layer.in_proj_weight",
        f"{place}.base_layer.out_proj.base_layer.weight",
        f"{place}.base_layer.out_proj.lora",
        f"{place}.base_layer.out_proj+lora",
    ]


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_experts_in_one_parameter_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"experts": Experts()})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    found = matrices_of(peft.get_peft_model(model, config))
    place = "base_model.model.experts"
    assert found.refused == {f"{place}.lora": "it adapts a module that has no weight of that name"}
    assert list(shapes(found)) == [f"{place}.base_layer.gate_up_proj[{at}]" for at in range(3)]


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_parameter_than_the_weight_is_refused() -> None:
    class Two(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.second = nn.Parameter(torch.randn(4, 3))

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.second"])
    found = matrices_of(peft.get_peft_model(nn.Sequential(Two()), config))
    assert found.refused == {"base_model.model.0.lora": "it adapts second, not the weight"}


def test_an_adapter_whose_product_cannot_be_taken_is_refused(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(adapter: str) -> None:
        raise RuntimeError("not for this layer")

    monkeypatch.setattr(adapted.base_model.model[0], "get_delta_weight", fails)
    assert matrices_of(adapted).refused == {
        "base_model.model.0.lora": "its product cannot be taken (RuntimeError)"
    }


def test_a_state_dict_of_three_factors_is_refused() -> None:
    state = {"q.lora_A.default": torch.randn(2, 6), "q.lora_B.default": torch.randn(5, 2),
             "q.lora_E.default": torch.randn(2, 1)}  # fmt: skip
    found = matrices_in(state)
    assert not found.matrices
    assert found.refused == {"q.lora": "it is AdaLoRA's, with a factor more than A and B"}
