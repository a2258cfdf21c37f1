"""What a model makes of a probe set, seen without a trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from entropylens.capture.call import Call
from entropylens.capture.insides import Insides, ProbeSet, Seen
from entropylens.capture.layers import layers_of
from entropylens.capture.probe import Batch
from entropylens.capture.tokens import Grid

IDS = torch.randint(3, 40, (4, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
IMAGES = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(2))


def llama(kind: str) -> nn.Module:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
                         attn_implementation=kind)  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(kind: str) -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0,
                        eos_token_id=0, attn_implementation=kind)  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(kind: str) -> nn.Module:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=40, vocab_size=50, attn_implementation=kind)  # fmt: skip
    return BertForSequenceClassification(config)


class Encoder(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)
        self.axis = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(x if self.axis else x.movedim(0, 1))
        return self.head(found.mean(self.axis))


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(484, 32),
                         nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))  # fmt: skip


def widely(model: nn.Module) -> nn.Module:
    """With weights of such a size that attention is far from uniform."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def kept(model: nn.Module, call: Call, columns: int = 1, **wanted: Any) -> Insides:
    rows = call.tensors()[0].shape[0]
    targets = torch.arange(rows * columns).view(rows, columns) % 10
    present = torch.ones_like(targets, dtype=torch.bool)
    if columns > 1:
        present[0, :6] = False
    found = Insides(model, ProbeSet(**wanted))
    batch = Batch(call=call, grid=Grid(targets=targets, present=present))
    assert found.keep(batch, torch.Generator().manual_seed(0))
    return found


def seen(found: Insides) -> Seen:
    with torch.no_grad():
        return found.look(states=True, attention=True)


def tokens(model: nn.Module) -> Call:
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    return Call(module=model, kwargs=given)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_attention_of_a_causal_model_is_that_of_its_eager_maps(make: Any, kind: str) -> None:
    model = widely(make(kind))
    found = kept(model, tokens(model), 16)
    attention = seen(found).attention
    assert attention is not None
    reference = widely(make("eager")).eval()
    with torch.no_grad():
        maps = reference(IDS, attention_mask=MASK, output_attentions=True).attentions
    queries = found._parts[0].queries
    assert queries is not None
    row = torch.arange(4)[:, None]
    present = queries.present.flatten()
    for layer, own in zip(maps, attention.layers.values(), strict=True):
        chosen = layer.double().movedim(1, 2)[row, queries.columns].flatten(0, 1)
        expected = torch.special.entr(chosen).sum(-1).float()
        torch.testing.assert_close(own.entropy[present], expected[present], atol=1e-5, rtol=0)
        # Of the first sequence the first five keys are padding.
        reach = queries.columns + 1
        reach[0] = reach[0] - 5
        assert torch.equal(own.reach[present], reach.flatten()[present])
        assert not own.reach[~present].any()
    assert not present.all()


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_of_an_encoder_is_that_of_its_eager_maps(kind: str) -> None:
    model = widely(bert(kind))
    found = kept(model, Call(module=model, kwargs={"input_ids": IDS, "attention_mask": MASK}))
    attention = seen(found).attention
    assert attention is not None
    assert list(attention.layers) == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    reference = widely(bert("eager")).eval()
    with torch.no_grad():
        maps = reference(IDS, attention_mask=MASK, output_attentions=True).attentions
    for layer, own in zip(maps, attention.layers.values(), strict=True):
        every = torch.special.entr(layer.double()).sum(-1).float()
        queries = found._parts[0].queries
        assert queries is not None
        expected = every.movedim(1, 2)[torch.arange(4)[:, None], queries.columns].flatten(0, 1)
        # All that is no padding, each once.
        present = queries.present.flatten()
        assert int(present.sum()) == int(MASK.sum())
        torch.testing.assert_close(own.entropy[present], expected[present], atol=1e-5, rtol=0)
        assert own.reach.view(4, -1).amax(1).tolist() == [12, 17, 17, 17]
        assert not own.reach[~present].any()


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_torch_are_seen_whichever_axis_comes_first(batch_first: bool) -> None:
    model = widely(Encoder(batch_first=batch_first))
    x = torch.randn(6, 9, 32)
    found = kept(model, Call(module=model, args=(x,)))
    first = seen(found)
    assert first.attention is not None
    assert list(first.attention.layers) == [f"encoder.layers.{i}.self_attn" for i in range(2)]
    model.eval()
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        given = x if batch_first else x.movedim(0, 1)
        hidden = model.encoder.layers[0](given)  # type: ignore[union-attr, index, operator]
        torch.backends.mha.set_fastpath_enabled(True)
    expected = hidden.mean(1 if batch_first else 0)
    order = found._parts[0].row
    torch.testing.assert_close(first.states["encoder.layers.0"], expected[order])


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_is_seen_with_and_without_its_map(weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            mask = torch.ones(5, 5).triu(1).bool()
            out, _ = self.attention(h, h, h, need_weights=weights, attn_mask=mask)
            return self.head(out.mean(1))

    torch.manual_seed(0)
    model = Model()
    attention = seen(kept(model, Call(module=model, args=(torch.randn(3, 5, 8),)))).attention
    assert attention is not None
    (own,) = attention.layers.values()
    columns = (torch.arange(4) + torch.arange(3)[:, None]) % 5
    assert torch.equal(own.reach, (columns + 1).flatten())


def test_queries_attend_as_torch_aligns_a_causal_mask() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = self.attention(x).view(len(x), 6, 2, 4).movedim(1, 2)
            return self.head(scaled_dot_product_attention(q, q, q, is_causal=True).flatten(2)[:, 0])

    model = Model()
    model.head = nn.Linear(24, 2)
    attention = seen(kept(model, Call(module=model, args=(torch.randn(3, 6, 8),)))).attention
    assert attention is not None
    (own,) = attention.layers.values()
    columns = (torch.arange(4) + torch.arange(3)[:, None]) % 6
    assert torch.equal(own.reach, (columns + 1).flatten())


def test_hidden_states_are_those_of_an_evaluation() -> None:
    model = convolutional()
    found = kept(model, Call(module=model, args=(IMAGES,)))
    first = seen(found)
    assert list(first.states) == ["0", "3", "6", "9"]
    reading = found.reading(found.tensors(first))
    model.eval()
    with torch.no_grad():
        expected = model[:10](IMAGES)
        maps = model[:4](IMAGES).mean((2, 3))
    order = found._parts[0].row
    torch.testing.assert_close(reading.states["9"], expected[order])
    torch.testing.assert_close(reading.states["3"], maps[order])
    assert reading.labels == (order % 10).tolist()
    assert first.attention is None
    assert not reading.are_tokens


def test_hidden_states_of_tokens_stand_at_scored_positions() -> None:
    model = llama("sdpa")
    found = kept(model, tokens(model), 16, layers=["model.layers.5"], rows=30)
    reading = found.reading(found.tensors(seen(found)))
    part = found._parts[0]
    model.eval()
    with torch.no_grad():
        # The last layer's output comes before the norm.
        states = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        hidden = model.model.norm(reading.states["model.layers.5"])  # type: ignore[arg-type, operator]
    torch.testing.assert_close(hidden, states[-1][part.row, part.column])
    assert reading.are_tokens
    assert len(reading.labels or ()) == 30
    assert not ((part.row == 0) & (part.column < 6)).any()


def test_rows_of_several_batches_are_joined_until_there_are_enough() -> None:
    model = convolutional()
    found = Insides(model, ProbeSet(rows=50))
    for start in (0.0, 1.0, 2.0):
        assert not found.is_complete
        targets = torch.full((20, 1), int(start))
        grid = Grid(targets=targets, present=torch.ones_like(targets, dtype=torch.bool))
        batch = Batch(call=Call(module=model, args=(IMAGES + start,)), grid=grid)
        assert found.keep(batch, torch.Generator().manual_seed(0))
    assert found.is_complete
    reading = found.reading(found.tensors(seen(found)))
    assert reading.labels == [0] * 20 + [1] * 20 + [2] * 10
    lengths = {name: len(values) for name, values in reading.states.items()}
    assert lengths == dict.fromkeys(found.layers, 50)


def test_a_row_that_comes_twice_counts_once() -> None:
    model = convolutional()
    found = Insides(model, ProbeSet(rows=40))
    grid = Grid(targets=torch.zeros(20, 1, dtype=torch.long), present=torch.ones(20, 1).bool())
    for _ in range(2):
        batch = Batch(call=Call(module=model, args=(IMAGES,)), grid=grid)
        assert found.keep(batch, torch.Generator().manual_seed(0))
    reading = found.reading(found.tensors(seen(found)))
    assert len(reading.states["9"]) == len(reading.labels or ()) == 20


def test_too_few_rows_are_no_reading() -> None:
    model = convolutional()
    found = Insides(model, ProbeSet())
    present = torch.zeros(20, 1, dtype=torch.bool)
    present[:3] = True
    grid = Grid(targets=torch.zeros(20, 1, dtype=torch.long), present=present)
    found.keep(Batch(call=Call(module=model, args=(IMAGES,)), grid=grid), torch.Generator())
    with pytest.raises(ValueError, match="ProbeSet: expected at least 8 rows with a target, got 3"):
        found.reading(found.tensors(seen(found)))


@pytest.mark.parametrize("make", [lambda: llama("sdpa"), convolutional])
def test_looking_leaves_no_trace(make: Any) -> None:
    torch.manual_seed(0)
    model = make().train()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    call = Call(module=model, args=(IMAGES,)) if isinstance(model, nn.Sequential) else tokens(model)
    found = kept(model, call, 1 if isinstance(model, nn.Sequential) else 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    drawn = torch.get_rng_state()
    first, second = seen(found), seen(found)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert not calls
    for name, value in first.states.items():
        assert torch.equal(value, second.states[name])
        assert not value.requires_grad


def test_inputs_of_ones_own_may_be_given() -> None:
    model = convolutional()
    wanted = ProbeSet(inputs=IMAGES, labels=torch.arange(20) % 4, layers=["9"])
    found = Insides(model, wanted)
    assert found.keep(wanted.batch(model), torch.Generator().manual_seed(0))
    reading = found.reading(found.tensors(seen(found)))
    assert list(reading.states) == ["9"]
    assert reading.labels == (found._parts[0].row % 4).tolist()
    language = llama("sdpa")
    wanted = ProbeSet(inputs={"input_ids": IDS, "attention_mask": MASK}, labels=IDS)
    found = Insides(language, wanted)
    assert found.keep(wanted.batch(language), torch.Generator().manual_seed(0))
    assert found.reading(found.tensors(seen(found))).are_tokens


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"labels": torch.zeros(3)}, ValueError, "expected inputs beside labels, got none"),
        ({"rows": 3}, ValueError, "expected rows >= 8, got 3"),
        ({"inputs": [1, 2]}, TypeError, "expected inputs as a tensor or a mapping of arguments"),
    ],
)
def test_a_probe_set_that_says_nothing_is_refused(
    given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ProbeSet(**given)


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match="expected inputs that hold a tensor with a row for each"):
        ProbeSet(inputs={"text": "words"}).batch(nn.Linear(2, 2))


def test_layers_are_blocks_evenly_spaced_or_the_parts_before_the_head() -> None:
    assert layers_of(llama("sdpa")) == [f"model.layers.{i}" for i in (1, 2, 4, 5)]
    assert layers_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))) == ["1"]
    assert layers_of(convolutional()) == ["0", "3", "6", "9"]
    assert layers_of(nn.Linear(3, 2)) == []

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 3)
            self.relu = nn.ReLU()
            self.stages = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3))
            self.fc = nn.Linear(8, 2)

    inner = Residual()
    assert layers_of(inner) == ["stem", "stages"]
    within = nn.ModuleDict({"net": inner, "loss": nn.MSELoss()})
    assert layers_of(within) == ["net.stem", "net.stages"]
    assert layers_of(inner, ["stages.*", "fc"]) == ["stages.0", "stages.1", "fc"]
    with pytest.raises(ValueError, match=r"expected layers to name modules .*, got 'stage'"):
        layers_of(inner, ["stage"])


def states_of(model: nn.Module, call: Call, columns: int = 1, **wanted: Any) -> Any:
    found = kept(model, call, columns, **wanted)
    return found, seen(found).states


def test_padding_changes_nothing_of_a_classifier() -> None:
    model = bert("sdpa")
    more = torch.zeros(4, 30, dtype=torch.long)
    mask = torch.ones_like(IDS)
    short = {"input_ids": IDS, "attention_mask": mask}
    long = {"input_ids": torch.cat([IDS, more], 1), "attention_mask": torch.cat([mask, more], 1)}
    _, first = states_of(model, Call(module=model, kwargs=short))
    _, second = states_of(model, Call(module=model, kwargs=long))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=1e-5)


def test_what_is_written_over_later_is_read_before() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(9, 6)
    found, states = states_of(model, Call(module=model, args=(x,)), layers=["0"])
    torch.testing.assert_close(states["0"], model[0](x)[found._parts[0].row].detach())


class Last(nn.Module):
    """Features last, as Swin has them, or put back to the front, as ConvNeXt does."""

    def __init__(self, *, back: bool) -> None:
        super().__init__()
        self.mix, self.head, self.back = nn.Linear(6, 6), nn.Linear(6, 2), back

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x.movedim(1, -1))
        return h.movedim(-1, 1) if self.back else h


@pytest.mark.parametrize("back", [True, False])
def test_features_are_found_whichever_axis_they_are_on(back: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Last(back=back), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h.mean((2, 3)) if back else h.mean((1, 2)))

    model, x = Model(), torch.randn(9, 6, 4, 5)
    found, states = states_of(model, Call(module=model, args=(x,)), layers=["body"])
    expected = model.body.mix(x.movedim(1, -1)).mean((1, 2)).detach()
    torch.testing.assert_close(states["body"], expected[found._parts[0].row])


def test_a_convolution_over_a_series_is_averaged_over_time() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(9, 3, 8)
    found, states = states_of(model, Call(module=model, args=(x,)), layers=["1"])
    torch.testing.assert_close(states["1"], model[:2](x).mean(2)[found._parts[0].row].detach())


def test_a_convolution_over_tokens_has_states_at_positions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(40, 16), nn.Conv1d(16, 16, 3, padding=1)
            self.head = nn.Linear(16, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.conv(self.embed(ids).mT).mT)

    model = Model()
    found, states = states_of(model, Call(module=model, args=(IDS,)), 17, layers=["conv"])
    part = found._parts[0]
    expected = model.conv(model.embed(IDS).mT).mT[part.row, part.column].detach()
    torch.testing.assert_close(states["conv"], expected)


def test_as_many_rows_as_positions_are_told_apart_by_the_layer() -> None:
    model = Encoder(batch_first=False)
    x = torch.randn(9, 9, 32)
    found, states = states_of(model, Call(module=model, args=(x,)), layers=["encoder.layers.0"])
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    hidden = model.encoder.layers[0](x.movedim(0, 1)).mean(0).detach()
    torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(states["encoder.layers.0"], hidden[found._parts[0].row])


def test_labels_stay_beside_their_rows_where_only_some_are_kept() -> None:
    model = convolutional()
    found, states = states_of(model, Call(module=model, args=(IMAGES,)), rows=11, layers=["9"])
    reading = found.reading(found.tensors(Seen(states, None)))
    model.eval()
    with torch.no_grad():
        every = model[:10](IMAGES)
    for state, label in zip(reading.states["9"], reading.labels or (), strict=True):
        at = int((every - state).abs().sum(1).argmin())
        torch.testing.assert_close(every[at], state)
        assert at % 10 == label


class Communicates(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.head, self.what = nn.Linear(3, 3), nn.Linear(3, 2), what
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1.0)
        if self.what == "ranks":
            torch.distributed.all_reduce(torch.ones(1))
        if self.what == "weights":
            with torch.no_grad():
                self.head.weight.mul_(0.9)
        return self.head(self.first(x))


@pytest.mark.parametrize(
    ("what", "message"), [("ranks", "communicates with other ranks"), ("weights", "to its weights")]
)
def test_a_forward_that_does_more_is_stopped_before_it_does(
    what: str, message: str, tmp_path: Path
) -> None:
    model = Communicates(what)
    found = kept(model, Call(module=model, args=(torch.randn(9, 3),)))
    before = model.head.weight.detach().clone()
    met = f"file://{tmp_path}/ranks"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=met)
    try:
        with pytest.raises(RuntimeError, match=message):
            seen(found)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(model.head.weight, before)
    assert model.seen == []


def test_what_a_forward_gathers_is_left_as_it_was() -> None:
    model = Communicates("nothing")
    model.seen = [3.0]
    gathered = model.seen
    assert seen(kept(model, Call(module=model, args=(torch.randn(9, 3),)))).states
    assert model.seen is gathered
    assert model.seen == [3.0]


def test_half_weights_take_single_inputs_as_their_training_does() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16()
    _, states = states_of(model, Call(module=model, args=(torch.randn(9, 3),)))
    assert states["1"].dtype == torch.float32


def test_a_shared_argument_is_kept_as_it_was() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.head(self.first(x) * scale)

    model, scale = Scaled(), torch.ones(())
    found = kept(model, Call(module=model, args=(torch.randn(9, 3), scale)), layers=["head"])
    first = seen(found).states["head"]
    scale.mul_(5.0)
    torch.testing.assert_close(seen(found).states["head"], first)


def test_a_text_without_labels_is_read_at_every_position_that_is_no_padding() -> None:
    model = llama("sdpa")
    wanted = ProbeSet(inputs={"input_ids": IDS, "attention_mask": MASK})
    found = Insides(model, wanted)
    assert found.keep(wanted.batch(model), torch.Generator().manual_seed(0))
    reading = found.reading(found.tensors(seen(found)))
    assert reading.labels is None
    assert reading.are_tokens
    assert len(reading.states["model.layers.5"]) == int(MASK.sum())


def test_labels_of_another_length_are_refused() -> None:
    wanted = ProbeSet(inputs=IMAGES, labels=torch.zeros(40, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"expected labels \[20\] or \[20, T\], .*got shape \(40,\)"
    ):
        wanted.batch(convolutional())
