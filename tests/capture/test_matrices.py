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


def test_a_sharded_parameter_is_refused() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:29613")
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        assert matrices_of(model).refused == {"weight": "it is sharded over ranks"}
    finally:
        destroy_process_group()


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
