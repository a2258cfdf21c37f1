from copy import deepcopy
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropylens.capture.forward import Forward, ModelTap
from entropylens.capture.tokens import FusedTokens, HiddenTokens, LogitTokens


class ToyForCausalLM(nn.Module):
    """Speaks as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.head(x)
        return SimpleNamespace(logits=logits, loss=logits.sum())


class ToyForTokenClassification(ToyForCausalLM):
    pass


class Events:
    """What a tap talks to."""

    def __init__(self, labels: Tensor | None = None, due: tuple[str, ...] = ("tokens",)) -> None:
        self.next_labels = labels
        self.due: dict[str, Any] = dict.fromkeys(due, ())
        self.found: list[Forward] = []

    def take_forward(self, forward: Forward) -> None:
        self.found.append(forward)


def tapped(model: nn.Module, events: Events) -> ModelTap:
    return ModelTap(model, events, lambda where, work: work())


def seen(model: nn.Module, *args: Any, grad: bool = True, **kwargs: Any) -> list[Forward]:
    events = Events()
    tap = tapped(model, events)
    with torch.set_grad_enabled(grad):
        model(*args, **kwargs)
    tap.remove()
    model(*args, **kwargs)
    return events.found


def targets_of(forward: Forward) -> list[list[int]]:
    """Targets that are scored, those that are masked as -1."""
    assert forward.tokens is not None
    grid = forward.tokens.grid
    return torch.where(grid.present, grid.targets, -1).tolist()


def test_a_causal_model_scores_each_position_on_the_next_label() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    (forward,) = seen(ToyForCausalLM(), torch.randn(2, 3, 4), labels=labels)
    assert isinstance(forward.tokens, LogitTokens)
    assert forward.tokens.logits.shape == (2, 2, 7)
    assert targets_of(forward) == [[2, 3], [5, -1]]
    assert not forward.tokens.logits.requires_grad
    assert forward.loss is not None
    assert not forward.loss.requires_grad
    assert not forward.loss_is_sum


def test_any_other_model_scores_each_position_on_its_own_label() -> None:
    labels = torch.tensor([[1, 2, 3]])
    (forward,) = seen(ToyForTokenClassification(), torch.randn(1, 3, 4), labels=labels)
    assert targets_of(forward) == [[1, 2, 3]]


def test_a_loss_divided_by_the_steps_tokens_is_a_share() -> None:
    labels = torch.zeros(1, 3, dtype=torch.long)
    (forward,) = seen(
        ToyForCausalLM(), torch.randn(1, 3, 4), labels=labels, num_items_in_batch=torch.tensor(9)
    )
    assert forward.loss_is_sum


def test_passes_without_gradients_are_not_training() -> None:
    assert seen(ToyForCausalLM(), torch.randn(1, 3, 4), grad=False) == []


def test_without_labels_there_is_a_loss_but_no_targets() -> None:
    (forward,) = seen(ToyForCausalLM(), torch.randn(1, 3, 4))
    assert forward.tokens is None
    assert forward.loss is not None


def test_labels_that_are_no_classes_are_left_alone() -> None:
    model = ToyForTokenClassification()
    (regression,) = seen(model, torch.randn(2, 4), labels=torch.randn(2))
    assert regression.tokens is None
    (other,) = seen(model, torch.randn(2, 4), labels=torch.zeros(5, dtype=torch.long))
    assert other.tokens is None


def test_outputs_that_are_not_ours_to_read_are_left_alone() -> None:
    assert seen(nn.Linear(3, 2), torch.randn(4, 3)) == []


def test_a_mapping_is_read_like_an_object() -> None:
    class Mapped(ToyForCausalLM):
        def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            return {"logits": self.head(x), "loss": torch.tensor(1.0)}

    labels = torch.zeros(1, 3, dtype=torch.long)
    (forward,) = seen(Mapped(), torch.randn(1, 3, 4), labels=labels)
    assert isinstance(forward.tokens, LogitTokens)


@pytest.mark.parametrize(
    ("name", "attributes", "shifted"),
    [
        ("Gemma3", {"loss_type": "ForConditionalGeneration"}, True),
        ("T5", {"loss_type": "ForConditionalGeneration",
                "config": SimpleNamespace(is_encoder_decoder=True)}, False),
        ("GPT2LMHeadModel", {"loss_type": None}, True),
        ("XLMWithLMHeadModel", {"loss_type": None}, False),
    ],
)  # fmt: skip
def test_labels_are_shifted_where_the_family_of_models_does(
    name: str, attributes: dict[str, Any], shifted: bool
) -> None:
    model = type(name, (ToyForTokenClassification,), attributes)()
    (forward,) = seen(model, torch.randn(1, 3, 4), labels=torch.tensor([[1, 2, 3]]))
    assert targets_of(forward) == ([[2, 3]] if shifted else [[1, 2, 3]])


def test_a_wrapped_model_is_aligned_as_the_one_within() -> None:
    labels = torch.tensor([[1, 2, 3]])
    wraps: list[Any] = [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
    for wrap in wraps:
        (forward,) = seen(wrap(ToyForCausalLM()), torch.randn(1, 3, 4), labels=labels)
        assert targets_of(forward) == [[2, 3]]


def test_labels_that_the_model_was_not_given_can_be_told() -> None:
    model, events = ToyForCausalLM(), Events(torch.tensor([[1, 2, 3]]))
    tapped(model, events)
    model(torch.randn(1, 3, 4))
    assert targets_of(events.found[0]) == [[2, 3]]


def test_a_tapped_model_can_be_saved_and_its_copies_are_not_tapped() -> None:
    events = Events()
    model = ToyForCausalLM()
    tapped(model, events)
    saved = BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    torch.load(saved, weights_only=False)(torch.randn(1, 3, 4))
    deepcopy(model)(torch.randn(1, 3, 4))
    assert events.found == []
    model(torch.randn(1, 3, 4))
    assert len(events.found) == 1


def test_where_nothing_is_due_nothing_is_read() -> None:
    model, events = ToyForCausalLM(), Events(due=())
    tapped(model, events)
    model(torch.randn(1, 3, 4), labels=torch.zeros(1, 3, dtype=torch.long))
    assert events.found == []


def test_a_forward_repeated_by_checkpointing_is_seen_once() -> None:
    model, events = ToyForCausalLM(), Events()
    tapped(model, events)
    labels = torch.zeros(1, 3, dtype=torch.long)
    inputs = torch.randn(1, 3, 4, requires_grad=True)

    def whole(x: Tensor) -> Tensor:
        return model(x, labels=labels).loss

    torch.utils.checkpoint.checkpoint(whole, inputs, use_reentrant=False).backward()
    assert len(events.found) == 1


def test_packed_rows_are_told_apart_by_their_positions_unless_padding_explains_them() -> None:
    labels = torch.tensor([[1, 2, -100, 4, 5]])
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    given: dict[str, Any] = {"labels": labels, "position_ids": positions}
    (packed,) = seen(ToyForCausalLM(), torch.randn(1, 5, 4), **given)
    assert packed.tokens is not None
    assert packed.tokens.grid.documents is not None
    assert packed.tokens.grid.documents.tolist() == [[0, 1, 1, 1]]
    masked = {**given, "attention_mask": torch.ones(1, 5)}
    (padded,) = seen(ToyForCausalLM(), torch.randn(1, 5, 4), **masked)
    assert padded.tokens is not None
    assert padded.tokens.grid.documents is None


class Backbone(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=x * 2)


class FusedForCausalLM(nn.Module):
    """As TRL patches models: log-probabilities and entropies, no logits, no call of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Backbone()
        self.head = nn.Linear(4, 7)
        self.config = SimpleNamespace(final_logit_softcapping=3.0, logit_scale=0.5, vocab_size=7)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def logits(self, hidden: Tensor) -> Tensor:
        return 3.0 * torch.tanh(0.5 * self.head(hidden) / 3.0)

    def forward(self, x: Tensor, labels: Tensor, virtual: int = 0) -> Any:
        hidden = self.base_model(x).last_hidden_state
        padded = torch.nn.functional.pad(labels, (virtual, 0), value=-100)
        mask = padded[:, 1:] >= 0
        logp = self.logits(hidden[:, :-1]).log_softmax(-1)
        picked = logp.gather(-1, padded[:, 1:].clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=picked * mask, entropy=-(logp.exp() * logp).sum(-1) * mask, label_mask=mask
        )


@pytest.mark.parametrize("virtual", [0, 2])
def test_a_fused_head_gives_two_columns_and_the_hidden_states_the_rest(virtual: int) -> None:
    model, events = FusedForCausalLM(), Events()
    tap = tapped(model, events)
    labels = torch.tensor([[-100, 2, 3, 6], [4, 5, -100, 1]])
    inputs = torch.randn(2, 4 + virtual, 4)
    for _ in range(2):
        model(inputs, labels=labels, virtual=virtual)
    blind, whole = (forward.tokens for forward in events.found)
    assert isinstance(blind, FusedTokens)
    assert isinstance(whole, FusedTokens)
    generator = torch.Generator().manual_seed(0)
    unseen = blind.measure(None, generator, 1.0).distribution_weight
    assert unseen is not None
    assert unseen.sum() == 0
    found = whole.measure(None, generator, 1.0)
    assert found.distribution_weight is not None
    assert torch.equal(found.distribution_weight, found.weight)
    scored = 5 if virtual == 0 else 6  # the first label too has a token before it
    assert found.present.sum() == scored
    logp = model.logits(2 * inputs[:, :-1]).double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    varentropy = (logp.exp() * (logp + entropy[..., None]) ** 2).sum(-1).flatten()
    chosen = found.present
    assert torch.allclose(found.entropy[chosen].double(), entropy.flatten()[chosen], atol=1e-6)
    assert torch.allclose(found.varentropy[chosen].double(), varentropy[chosen], atol=1e-6)
    best = logp.exp().amax(-1).flatten()
    assert torch.allclose(found.max_probability[chosen].double(), best[chosen], atol=1e-6)
    assert found.vocabulary == 7
    tap.remove()
    assert not model._forward_hooks
    assert not model.base_model._forward_hooks


def test_a_sample_of_a_fused_forward_leaves_its_two_columns_whole() -> None:
    model, events = FusedForCausalLM(), Events()
    tapped(model, events)
    labels = torch.randint(0, 7, (3, 40), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(torch.randn(3, 40, 4), labels=labels)
    tokens = events.found[1].tokens
    assert tokens is not None
    found = tokens.measure(10, torch.Generator().manual_seed(0), 1.0)
    assert found.distribution_weight is not None
    assert (found.distribution_weight > 0).sum() == 10
    assert found.distribution_weight.sum().item() == pytest.approx(3 * 39)
    assert found.varentropy[found.distribution_weight > 0].isfinite().all()
    assert found.entropy.isfinite().all()
    assert found.weight.sum() == 3 * 39


def test_a_causal_model_that_builds_no_logits_is_read_from_its_hidden_states() -> None:
    class Lean(FusedForCausalLM):
        loss_type = "ForCausalLM"

        def forward(self, x: Tensor, labels: Tensor, virtual: int = 0) -> Any:
            hidden = self.base_model(x).last_hidden_state
            return SimpleNamespace(loss=hidden.sum(), logits=None)

    model, events = Lean(), Events()
    tapped(model, events)
    labels = torch.tensor([[1, 2, -100, 6]])
    inputs = torch.randn(1, 4, 4)
    for _ in range(2):
        model(inputs, labels=labels)
    first, second = events.found
    assert first.tokens is None
    assert isinstance(second.tokens, HiddenTokens)
    found = second.tokens.measure(None, torch.Generator(), 1.0)
    assert targets_of(second) == [[2, -1, 6]]
    logp = model.logits(2 * inputs[:, :-1]).double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[0]
    assert torch.allclose(found.entropy[found.present].double(), entropy[[0, 2]], atol=1e-6)
