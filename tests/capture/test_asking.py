"""Logits and their derivative along an update are those of the model, which notices nothing."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from untouched import tiny

from entropylens.capture.asking import Asked, Places, asked, logits_of, obstacle, positions
from entropylens.capture.call import Call

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, WIDTH, CLASSES = 4, 6, 7


class Attention(nn.Module):
    """A causal language model with a kernel that a library fused."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(tiny.VOCABULARY), 16)
        self.projection = nn.Linear(16, 48)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.projection(self.embedding(ids)).unflatten(-1, (3, 2, 8)).unbind(-3)
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(self.drop(mixed.transpose(1, 2).flatten(2)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(tiny.VOCABULARY), 16)
        self.memory = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.memory(self.embedding(ids))[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embedding = nn.Embedding(len(tiny.VOCABULARY), 16)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.layers(self.embedding(ids), mask=mask))


def perceptron() -> nn.Module:
    return tiny.Perceptron()


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, CLASSES)
    )


def normalised_convolution() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        assert norm.running_mean is not None
        norm.running_mean.fill_(0.4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES))


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    embedding = nn.Embedding(len(tiny.VOCABULARY), 16)
    return nn.Sequential(embedding, layer, nn.Linear(16, CLASSES))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tiny.VOCABULARY),
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def low_rank() -> Any:
    model = tiny.lora(tiny.llama())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    return model


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, len(tiny.VOCABULARY), (ROWS, WIDTH), generator=generator)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def update(model: nn.Module, relative: float = 1e-3) -> dict[str, Tensor]:
    """A direction of so much of the weights' norm, with a part for every weight."""
    generator, weights = torch.Generator().manual_seed(3), trained(model)
    drawn = {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    size, length = (
        float(torch.cat([v.flatten().double() for v in values.values()]).norm())
        for values in (weights, drawn)
    )
    return {n: value * (relative * size / length) for n, value in drawn.items()}


def everywhere(columns: int, rows: int = ROWS) -> Places:
    index = torch.arange(rows * columns)
    return Places(row=index // columns, column=index % columns, columns=columns)


def answer(
    model: nn.Module,
    direction: dict[str, Tensor],
    args: tuple[Any, ...] = (),
    *,
    columns: int = 1,
    **kwargs: Any,
) -> tuple[Asked, Tensor, Tensor]:
    """The asked model, its logits and their derivative at all places."""
    found = asked(model)
    call = found.fitting(Call(module=model, args=args, kwargs=kwargs))
    assert call is not None
    with found.as_trained():
        logits, change = found.derivative(trained(model), direction, call, everywhere(columns))
    return found, logits, change


def normalised(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    size = hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon
    return norm.weight * hidden / size.sqrt()


def reference(
    model: nn.Module, direction: dict[str, Tensor], forward: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits and their difference quotient over real forwards of a copy in double precision."""
    copy = deepcopy(model).double()
    for module in copy.modules():
        module.training = isinstance(module, nn.BatchNorm2d) and module.training
        if isinstance(module, LlamaRMSNorm):
            # Its own is in single precision whatever the model is in.
            module.forward = partial(normalised, module)
    weights = dict(copy.named_parameters())
    start = {name: weights[name].detach().clone() for name in direction}
    width = 1e-6 / max(float(value.abs().max()) for value in direction.values())

    def at(share: float) -> Tensor:
        with torch.no_grad():
            for name, value in direction.items():
                weights[name].copy_(start[name] + share * value.double())
            return forward(copy)

    ahead, behind = at(width), at(-width)
    further, back = at(2 * width), at(-2 * width)
    return at(0.0), (8 * (ahead - behind) - (further - back)) / (12 * width)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron": (perceptron, lambda: some(ROWS, 8)),
    "convolution": (convolution, lambda: some(ROWS, 3, 5, 5)),
    "convolution with batch norm": (normalised_convolution, lambda: some(ROWS, 3, 5, 5)),
    "scaled dot product attention": (Attention, words),
    "transformer encoder layer": (encoder_layer, words),
    "transformer encoder": (Encoder, words),
}


@pytest.mark.parametrize("case", CASES)
def test_the_derivative_is_that_of_the_loss_s_logits(case: str) -> None:
    torch.manual_seed(0)
    build, draw = CASES[case]
    model, given = build().train(), draw()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    direction = update(model)
    logits, change = reference(model, direction, lambda copy: copy(as_double(given)))
    columns = 1 if logits.ndim == 2 else WIDTH
    found, mine, along = answer(model, direction, (given,), columns=columns)
    assert found.is_exact
    assert error(mine, logits.reshape(mine.shape)) < 1e-5
    assert error(along, change.reshape(along.shape)) < 1e-4
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())


def as_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("build", [gpt2, tiny.llama, low_rank], ids=["gpt2", "llama", "lora"])
def test_the_derivative_of_language_models_is_that_of_all_their_logits(
    build: Callable[[], Any],
) -> None:
    torch.manual_seed(0)
    model, ids = build().train(), words()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    direction = update(model)
    logits, change = reference(
        model, direction, lambda copy: copy(input_ids=ids, attention_mask=mask).logits
    )
    seen = mask.bool().flatten()
    found, mine, along = answer(
        model, direction, columns=WIDTH, input_ids=ids, attention_mask=mask, labels=ids
    )
    assert found.is_exact
    assert not found.makes_all_logits
    assert error(mine[seen], logits.flatten(0, 1)[seen]) < 1e-5
    assert error(along[seen], change.flatten(0, 1)[seen]) < 1e-4


def test_a_recurrent_network_has_a_finite_difference_of_the_same_derivative() -> None:
    torch.manual_seed(0)
    model, ids = Recurrent(), words()
    direction = update(model)
    _, change = reference(model, direction, lambda copy: copy(ids))
    found, _, along = answer(model, direction, (ids,), columns=WIDTH)
    assert not found.is_exact
    assert error(along, change.flatten(0, 1)) < 1e-3


@pytest.mark.parametrize("times", [1e-4, 1e3])
def test_the_finite_difference_of_any_update_is_that_of_a_moderate_one(times: float) -> None:
    torch.manual_seed(0)
    model, ids = Recurrent(), words()
    direction = update(model)
    _, change = reference(model, direction, lambda copy: copy(ids))
    other = {name: times * value for name, value in direction.items()}
    found, _, along = answer(model, other, (ids,), columns=WIDTH)
    assert not found.is_exact
    assert error(along / times, change.flatten(0, 1)) < 1e-3


def test_no_update_has_a_finite_difference_of_zero() -> None:
    model = Recurrent()
    nothing = {name: torch.zeros_like(value) for name, value in trained(model).items()}
    _, _, along = answer(model, nothing, (words(),), columns=WIDTH)
    assert torch.equal(along, torch.zeros_like(along))


def test_classes_may_be_on_the_first_axis_behind_the_batch() -> None:
    torch.manual_seed(0)
    model, images = segmenter(), some(ROWS, 3, 5, 4)
    direction = update(model)
    logits, change = reference(model, direction, lambda copy: copy(images.double()))
    assert logits.shape == (ROWS, CLASSES, 5, 4)
    _, mine, along = answer(model, direction, (images,), columns=20)
    for got, expected in ((mine, logits), (along, change)):
        by_hand = torch.stack(
            [expected[b, :, h, w] for b in range(ROWS) for h in range(5) for w in range(4)]
        )
        assert error(got, by_hand) < 1e-4
    with pytest.raises(
        ValueError, match=r"expected logits of 19 positions a row, got shape \(4, 7"
    ):
        answer(model, direction, (images,), columns=19)


@pytest.mark.parametrize(
    ("shape", "columns", "axis"),
    [
        ((2, 5), 1, 1),
        ((2, 4, 5), 4, 2),
        ((2, 5, 4), 4, 1),
        ((2, 4, 4), 4, 2),
        ((2, 5, 3, 4), 12, 1),
        ((2, 4, 3, 4), 12, 1),
        ((2, 3, 4, 5), 12, 3),
    ],
)
def test_classes_are_on_the_axis_that_leaves_so_many_positions(
    shape: tuple[int, ...], columns: int, axis: int
) -> None:
    logits = some(*shape)
    others = [shape[i] for i in range(1, len(shape)) if i != axis]
    by_hand = torch.stack(
        [
            torch.stack([logits.select(axis, v)[(b, *place)] for v in range(shape[axis])])
            for b in range(2)
            for place in product(*map(range, others))
        ]
    )
    assert torch.equal(positions(logits, columns), by_hand.reshape(2, columns, -1))


class WithLoss(nn.Module):
    """Returns logits and loss, as plain language models do."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = Recurrent(), form

    def forward(self, ids: Tensor, targets: Tensor) -> Any:
        logits = self.net(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        forms: dict[str, Any] = {
            "logits, loss": (logits, loss),
            "loss, logits": (loss, logits),
            "dict": {"loss": loss, "logits": logits},
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["logits, loss", "loss, logits", "dict"])
def test_logits_are_found_beside_a_loss(form: str) -> None:
    model, ids = WithLoss(form), words()
    _, logits, _ = answer(model, update(model), (ids, ids % CLASSES), columns=WIDTH)
    assert torch.allclose(logits, model.net(ids).flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "output", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, 3).long(), (), {"loss": 1.0}, None]
)
def test_what_has_no_classes_is_not_taken_for_logits(output: Any) -> None:
    assert logits_of(output) is None


def test_attention_masks_may_be_shared_by_all_rows() -> None:
    torch.manual_seed(0)
    model, ids = Encoder().eval(), words()
    mask = nn.Transformer.generate_square_subsequent_mask(WIDTH)
    call = Call(module=model, args=(ids,), kwargs={"mask": mask}).cut(torch.tensor([1, 3]), ROWS)
    assert call is not None
    found = asked(model)
    with found.as_trained():
        logits = found.logits(trained(model), call, everywhere(WIDTH, rows=2))
    assert torch.allclose(logits, model(ids, mask)[[1, 3]].flatten(0, 1), atol=1e-6)


def test_a_call_is_cut_wherever_its_tensors_have_its_rows() -> None:
    rows, shared = torch.arange(12.0).reshape(4, 3), torch.arange(3.0)
    given = {"names": "abcd", "scale": 2.0, "nested": {"first": rows, "other": [shared, rows]}}
    call = Call(module=nn.Identity(), args=(rows, shared, 4), kwargs=given)
    cut = call.cut(torch.tensor([0, 2]), 4)
    assert cut is not None
    half = rows[[0, 2]]
    assert torch.equal(cut.args[0], half)
    assert torch.equal(cut.args[1], shared)
    assert cut.args[2] == 4
    assert (cut.kwargs["names"], cut.kwargs["scale"]) == ("abcd", 2.0)
    assert torch.equal(cut.kwargs["nested"]["first"], half)
    assert torch.equal(cut.kwargs["nested"]["other"][0], shared)
    assert torch.equal(cut.kwargs["nested"]["other"][1], half)
    assert call.cut(torch.tensor([0, 2]), 5) is None


def test_a_batch_in_a_dict_is_asked_about() -> None:
    class OfBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.Perceptron()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["x"])

    model, features = OfBatch().eval(), some(ROWS, 8)
    _, logits, _ = answer(model, update(model), ({"x": features},))
    assert torch.allclose(logits, model({"x": features}), atol=1e-6)


def test_weights_of_half_the_precision_are_asked_in_single() -> None:
    """Inputs and statistics of batch norm have the weights' precision and are widened with them."""
    torch.manual_seed(0)
    model, images = normalised_convolution().bfloat16(), some(ROWS, 3, 5, 5).bfloat16()
    for mode in (True, False):
        model.train(mode)
        expected, _ = reference(model, update(model), lambda copy: copy(images.double()))
        _, logits, change = answer(model, update(model), (images,))
        assert logits.dtype == change.dtype == torch.float32
        assert error(logits, expected) < 1e-5
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16, torch.int64}


def test_a_frozen_base_of_half_the_precision_is_asked_in_single() -> None:
    torch.manual_seed(0)
    model, ids = low_rank(), words()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    direction = update(model)
    expected, change = reference(model, direction, lambda copy: copy(input_ids=ids).logits)
    found, logits, along = answer(model, direction, columns=WIDTH, input_ids=ids)
    assert found.is_exact
    assert error(logits, expected.flatten(0, 1)) < 1e-5
    assert error(along, change.flatten(0, 1)) < 1e-4


def test_a_frozen_base_of_double_precision_stays_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    model[0].requires_grad_(False)
    features = some(ROWS, 8).double()
    _, logits, _ = answer(model, {n: v.double() for n, v in update(model).items()}, (features,))
    assert logits.dtype == torch.float64
    assert torch.equal(logits, model(features))


class Noisy(nn.Module):
    """Draws random numbers in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.Perceptron()
        self.norm = nn.BatchNorm1d(tiny.CLASSES)
        self.fails = False

    def forward(self, features: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no such thing")
        return self.norm(dropout(self.net(features), 0.5))


@pytest.mark.parametrize("fails", [False, True], ids=["", "its forward raises"])
def test_the_model_and_the_random_numbers_are_left_as_they_were(fails: bool) -> None:
    torch.manual_seed(0)
    model, features = Noisy().train(), some(ROWS, 8)
    model.net.layers[2].eval()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.register_forward_pre_hook(lambda *_: seen.append(2))
    before = left(model)
    model.fails = fails
    found = asked(model)
    call = Call(module=model, args=(features,))
    state = torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    precision = torch.get_float32_matmul_precision()
    expected = pytest.raises(RuntimeError, match="no such thing") if fails else nullcontext()
    with expected, found.as_trained():
        found.derivative(trained(model), update(model), call, everywhere(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.get_float32_matmul_precision() == precision
    assert seen == []
    after = left(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        is_same = (
            torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value
        )
        assert is_same, name


def left(model: nn.Module) -> dict[str, Any]:
    """Everything that asking could leave changed."""
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} itself"] = id(value)
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
        found[f"{name} hooks"] = [*module._forward_hooks.values()]
        found[f"{name} pre-hooks"] = [*module._forward_pre_hooks.values()]
        found[f"{name} attributes"] = sorted(module.__dict__)
    return found


def test_dropout_is_off() -> None:
    model, features = tiny.Perceptron().train(), some(ROWS, 8)
    answers = [answer(model, update(model), (features,))[1] for _ in range(2)]
    assert torch.equal(*answers)
    assert torch.allclose(answers[0], deepcopy(model).eval()(features), atol=1e-6)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_others_within_the_model_are_refused(kind: str) -> None:
    model = tiny.Perceptron()

    def spy(*_: Any) -> None:
        raise AssertionError

    getattr(model.layers[1], kind)(spy)
    found = asked(model)
    with (
        pytest.raises(
            ValueError,
            match=r"^entropylens: expected modules without forward hooks of others, which would "
            r"see our forwards or be missed by them, got layers\.1: .*spy$",
        ),
        found.as_trained(),
    ):
        pass


def test_the_forward_is_not_in_the_autocast_that_accelerate_puts_around_it() -> None:
    torch.manual_seed(0)
    model: Any = tiny.Perceptron().eval()
    given = some(ROWS, 8)
    expected = model(given)
    # As Accelerator.prepare_model does it.
    model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    wrapped = model.forward
    assert not torch.allclose(model(given).float(), expected, atol=1e-5)
    _, logits, _ = answer(model, update(model), (given,))
    assert torch.allclose(logits, expected, atol=1e-6)
    assert model.forward is wrapped


@pytest.mark.parametrize("ask", ["logits", "derivative"])
def test_a_compiled_part_is_asked_as_it_was_written_and_compiled_for_its_own_calls_alone(
    ask: str,
) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    torch.manual_seed(0)
    plain, given = Scaled(8, CLASSES), some(ROWS, 8)
    model = Wrapped(torch.compile(deepcopy(plain), backend=backend))
    found, weights, direction = asked(model), trained(model), update(model)
    call = Call(module=model, args=(given,))
    with found.as_trained():
        if ask == "logits":
            logits = found.logits(weights, call, everywhere(1))
        else:
            logits, _ = found.derivative(weights, direction, call, everywhere(1))
    assert found.is_exact
    assert torch.allclose(logits, plain(given), atol=1e-6)
    assert compiled == []
    model(given)
    assert compiled == [1]


class Wrapped(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, given: Tensor) -> Tensor:
        return self.net(given)


def test_weights_that_are_no_plain_numbers_are_an_obstacle() -> None:
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    assert obstacle(packed) == "its weights are quantised"
    assert obstacle(nn.Linear(2, 2)) is None


class Writing(nn.Module):
    """Writes to what it holds in every forward."""

    calls: Tensor
    codes: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("codes", torch.zeros(CLASSES))
        self.register_buffer("mean", torch.zeros(()))
        self.penalty: Any = None

    def forward(self, features: Tensor) -> Tensor:
        logits = self.net(features)
        self.calls += 1
        self.codes.mul_(0.9).add_(logits.detach().mean(0))
        self.mean = 0.9 * self.mean + logits.mean()
        self.penalty = logits.square().mean()
        return logits


def test_what_a_forward_writes_to_its_module_is_taken_back() -> None:
    torch.manual_seed(0)
    model, features = Writing(), some(ROWS, 8)
    model(features)
    before, held = left(model), model.penalty
    _, logits, _ = answer(model, update(model), (features,))
    assert torch.allclose(logits, model.net(features), atol=1e-6)
    assert model.penalty is held
    after = left(model)
    assert all(
        torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value
        for name, value in before.items()
    )


def encoder(kind: Any) -> Any:
    return kind(
        BertConfig(
            vocab_size=len(tiny.VOCABULARY),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            is_decoder=kind is BertLMHeadModel,
        )
    )


@pytest.mark.parametrize(
    "build",
    [tiny.bart, partial(encoder, BertForMaskedLM), partial(encoder, BertLMHeadModel)],
    ids=["encoder and decoder", "masked", "head of several layers"],
)
def test_only_a_backbone_with_nothing_but_a_head_is_asked_without_all_logits(
    build: Callable[[], Any],
) -> None:
    torch.manual_seed(0)
    model, ids = build().eval(), words()
    with torch.no_grad():
        # Fewer targets than inputs: the decoder makes its own from them.
        labels = ids[:, 1:].contiguous() if model.config.is_encoder_decoder else ids
        expected = model(input_ids=ids, labels=labels).logits
    columns = labels.shape[1]
    found, logits, _ = answer(model, update(model), columns=columns, input_ids=ids, labels=labels)
    assert found.makes_all_logits
    assert torch.allclose(logits, expected.flatten(0, 1), atol=1e-5)


def test_whole_numbers_that_may_point_to_rows_hinder_that_some_are_left_out() -> None:
    nodes, edges = some(6, 3), torch.tensor([[0, 5, 2, 1], [1, 0, 5, 3]])
    call = Call(module=nn.Identity(), args=(nodes, edges))
    assert call.cut(torch.tensor([0, 2]), 6) is None
    assert call.cut(torch.arange(6), 6) is not None
    shared = torch.arange(3)[None]
    cut = Call(module=nn.Identity(), args=(nodes, shared)).cut(torch.tensor([0, 2]), 6)
    assert cut is not None
    assert cut.args[1] is shared


def test_logits_of_one_position_more_are_scored_on_the_next_token() -> None:
    logits = torch.randn(2, 7, 3)
    assert torch.equal(positions(logits, 6), logits[:, :6])
    with pytest.raises(ValueError, match="expected logits of 4 positions a row"):
        positions(logits, 4)
