"""Routers of a mixture of experts are read as transformers' own models declare them."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from untouched import tiny

import entropylens as el
from entropylens.capture.router import RouterTap, routers_of
from entropylens.registry import RouterReading

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS, EXPERTS, K = 3, 4, 2
COMMON: dict[str, Any] = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(intermediate_size=16, num_local_experts=EXPERTS, **COMMON)
    return MixtralForCausalLM(config)


def qwen3() -> Any:
    """Its middle layer has no experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        intermediate_size=16,
        moe_intermediate_size=8,
        num_experts=EXPERTS,
        head_dim=8,
        mlp_only_layers=[1],
        **COMMON,
    )
    return Qwen3MoeForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen3": qwen3}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


class Events:
    """What a tap talks to."""

    def __init__(self, *, wants_routers: bool = True) -> None:
        self.wants_routers = wants_routers
        self.found: list[RouterReading] = []

    def take_routers(self, reading: RouterReading) -> None:
        self.found.append(reading)


def run_at_once(where: str, work: Any) -> None:
    with torch.no_grad():
        work()


def tapped(model: nn.Module, events: Events) -> RouterTap:
    return RouterTap(model, events, run_at_once)


def ids_and_mask(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = next(tiny.token_batches(seed + 1))
    lengths = torch.tensor([12, 7, 10, 3])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, mask


def logits_by_hand(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The router's weight times what went into the layer's experts."""
    inputs: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = [
        gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        for gate in gates
        if hasattr(gate, "top_k")
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    weights = [gate.weight.detach().double() for gate in gates if hasattr(gate, "top_k")]
    return [one.double() @ weight.T for one, weight in zip(inputs, weights, strict=True)]


@every_model
def test_each_layer_s_logits_and_padding_are_as_by_hand(make: Any) -> None:
    model, events = make(), Events()
    ids, mask = ids_and_mask()
    expected = logits_by_hand(model, ids, mask)
    tapped(model, events)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    (reading,) = events.found
    layers = [0, 1, 2] if make is mixtral else [0, 2]
    assert list(reading.logits) == [f"model.layers.{at}.mlp.gate" for at in layers]
    for found, by_hand in zip(reading.logits.values(), expected, strict=True):
        assert found.shape == (ids.numel(), EXPERTS)
        assert torch.allclose(found.double(), by_hand, atol=1e-6)
        assert not found.requires_grad
    assert reading.experts_per_token == K
    assert reading.present is not None
    assert reading.present.tolist() == mask.bool().flatten().tolist()


@every_model
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_shows_each_layer_once(make: Any, reentrant: bool) -> None:
    model, events = make().train(), Events()
    ids, mask = ids_and_mask()
    expected = logits_by_hand(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    tapped(model, events)
    model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    (reading,) = events.found
    for found, by_hand in zip(reading.logits.values(), expected, strict=True):
        assert torch.allclose(found.double(), by_hand, atol=1e-6)


def test_transformers_own_recorder_finds_the_same_routers() -> None:
    for make in MODELS.values():
        model, events = make(), Events()
        ids, mask = ids_and_mask()
        tapped(model, events)
        theirs = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        (reading,) = events.found
        for ours, recorded in zip(reading.logits.values(), theirs.router_logits, strict=True):
            assert torch.equal(ours, recorded)


def test_only_training_forwards_that_are_due_are_read() -> None:
    model, events = mixtral(), Events()
    ids, mask = ids_and_mask()
    tapped(model, events)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert events.found == []
    events.wants_routers = False
    model(input_ids=ids, attention_mask=mask)
    assert events.found == []
    events.wants_routers = True
    model._is_replica = True  # as DataParallel marks what it runs in threads
    model(input_ids=ids, attention_mask=mask)
    assert events.found == []
    del model._is_replica
    model(input_ids=ids, attention_mask=mask)
    assert len(events.found) == 1


def test_without_a_mask_of_the_tokens_all_count() -> None:
    model, events = mixtral(), Events()
    ids, mask = ids_and_mask()
    tapped(model, events)
    model(input_ids=ids)
    model(ids, mask)
    plain, positional = events.found
    assert plain.present is None
    assert positional.present is not None
    assert positional.present.sum() == mask.sum()


def test_what_wraps_a_model_changes_neither_names_nor_numbers() -> None:
    model = mixtral()
    ids, mask = ids_and_mask()
    expected = logits_by_hand(model, ids, mask)
    adapted = tiny.lora(deepcopy(model))
    for wrapped in (nn.DataParallel(model), adapted):
        events = Events()
        tap = tapped(wrapped, events)
        wrapped(input_ids=ids, attention_mask=mask)
        (reading,) = events.found
        assert [name.count("layers") for name in reading.logits] == [1] * LAYERS
        for found, by_hand in zip(reading.logits.values(), expected, strict=True):
            assert torch.allclose(found.double(), by_hand, atol=1e-6)
        tap.remove()


def test_removed_hooks_are_gone_and_a_copy_of_the_model_is_not_tapped() -> None:
    model, events = mixtral(), Events()
    hooks = lambda: sum(  # noqa: E731
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )
    tap = tapped(model, events)
    assert hooks() == LAYERS + 2  # type: ignore[no-untyped-call]
    deepcopy(model)(input_ids=ids_and_mask()[0])
    assert events.found == []
    tap.remove()
    assert hooks() == 0  # type: ignore[no-untyped-call]


# -- other declarations than those of one class --------------------------------------------------


class Gate(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[..., :2], x[..., :3], x


class Gemma4TextRouter(Gate):
    """Its first output is what transformers records, and that are probabilities."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.softmax(-1), x, x


class Inner(nn.Module):
    def __init__(self, gate: type[Gate] = Gate, recorded: Any = None) -> None:
        super().__init__()
        self.first, self.second = gate(), gate()
        if recorded is not None:
            self._can_record_outputs = {"router_logits": recorded}

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for gate in (self.first, self.second):
            gate(inputs_embeds)
        return inputs_embeds


def recorder(target: Any = Gate, index: int = 0, layer: str | None = None, **more: Any) -> Any:
    known = {"target_class": target, "index": index, "layer_name": layer, "class_name": None}
    return SimpleNamespace(**{**known, **more})


class Outer(Inner):
    def __init__(self, recorded: Any, inner: Inner) -> None:
        super().__init__(recorded=recorded)
        self.inner = inner

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.inner(super().forward(inputs_embeds))


def read(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    events = Events()
    tapped(model, events)
    model(inputs_embeds=x)
    return {name: one for reading in events.found for name, one in reading.logits.items()}


def test_the_recorder_says_where_in_the_output_the_logits_are() -> None:
    x = torch.randn(2, 3, 5, requires_grad=True)
    for index, width in ((0, 2), (1, 3), (-1, 5)):
        found = read(Inner(recorded=recorder(index=index)), x)
        assert [one.shape for one in found.values()] == [(6, width)] * 2
    assert [one.shape for one in read(Inner(recorded=Gate), x).values()] == [(6, 3)] * 2


def test_the_recorder_may_name_the_place_of_a_router() -> None:
    x = torch.randn(2, 3, 5)
    assert list(read(Inner(recorded=recorder(layer="second")), x)) == ["second"]
    named = recorder(target=None, class_name="first")
    assert list(read(Inner(recorded=[named, recorder(layer=".second")]), x)) == ["first", "second"]
    assert list(read(Inner(recorded="first"), x)) == ["first"]


def test_a_model_within_a_model_has_declarations_of_its_own() -> None:
    x = torch.randn(2, 3, 5)
    both = Outer(recorder(index=0), Inner(recorded=recorder(index=2, layer="first")))
    found = read(both, x)
    assert {name: one.shape[1] for name, one in found.items()} == {
        "first": 2,
        "second": 2,
        "inner.first": 5,
    }


def test_probabilities_become_logits_with_the_same_softmax() -> None:
    x = torch.randn(2, 3, 5)
    for one in read(Inner(Gemma4TextRouter, recorder()), x).values():
        assert torch.allclose(one.softmax(-1), x.softmax(-1).flatten(0, 1))


def test_layers_of_other_tokens_are_left_out() -> None:
    class Double(Inner):
        def forward(self, inputs_embeds: Tensor) -> Tensor:
            self.first(inputs_embeds)
            self.second(inputs_embeds.repeat(2, 1, 1))
            return inputs_embeds

    assert list(read(Double(recorded=recorder()), torch.randn(2, 3, 5))) == ["first"]


def test_within_a_compiled_graph_nothing_is_read_and_nothing_breaks_it() -> None:
    model, events = Inner(recorded=recorder()), Events()
    tapped(model, events)
    x = torch.randn(2, 3, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs_embeds=x), x)
    assert events.found == []


def test_a_model_without_routers_does_not_suit() -> None:
    for model in (tiny.llama(), tiny.classifier(), tiny.Perceptron(), nn.Linear(2, 2)):
        assert routers_of(model) == {}
        assert not RouterTap.suits(model)


# -- through the Lens ------------------------------------------------------------------------------


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def trained(model: Any, folder: Path, *, steps: int = 3, micro_batches: int = 2) -> el.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    lens = el.Lens(model, optimizer, run_dir=folder, preset="full", max_overhead=None)
    with lens:
        for step in range(steps):
            for part in range(micro_batches):
                ids, mask = ids_and_mask(2 * step + part)
                labels = ids.masked_fill(mask == 0, -100)
                model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step()
    run = el.open_run(folder)
    assert run.status()[0].faults == {}
    return run


def test_a_plain_loop_writes_one_row_a_layer_and_step(tmp_path: Path) -> None:
    model = mixtral()
    ids, mask = ids_and_mask(0)
    logits = logits_by_hand(model, ids, mask)
    table = trained(model, tmp_path / "run").metrics("router/entropy/mean").to_arrow().to_pylist()
    names = [f"model.layers.{at}.mlp.gate" for at in range(LAYERS)]
    assert sorted((row["step"], row["module"]) for row in table) == [
        (step, name) for step in (1, 2, 3) for name in names
    ]
    first = {row["module"]: row for row in table if row["step"] == 1}
    for name, layer in zip(names, logits, strict=True):
        logp = layer[mask.bool().flatten()].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).mean().item()
        assert first[name]["value"] == pytest.approx(entropy, rel=1e-6)
        assert first[name]["weight"] == mask.sum()
    assert hooks_on(model) == 0


_INSIDE = ("representation", "attention")


def test_a_lens_on_a_dense_model_hooks_no_router(tmp_path: Path) -> None:
    model = tiny.llama()
    off = {name: False for name, one in el.all_diagnostics().items() if one.reads in _INSIDE}
    with el.Lens(model, None, run_dir=tmp_path / "run", preset="full", diagnostics=off):
        assert hooks_on(model) == 1


def test_the_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    watched, bare = mixtral(), mixtral()
    trained(watched, tmp_path / "run")
    optimizer = torch.optim.SGD(bare.parameters(), lr=1e-2)
    for step in range(3):
        for part in range(2):
            ids, mask = ids_and_mask(2 * step + part)
            labels = ids.masked_fill(mask == 0, -100)
            bare(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(watched.parameters(), bare.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
