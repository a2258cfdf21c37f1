from copy import deepcopy
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropylens.capture.forward import Forward, tap_forward


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


def seen(model: nn.Module, *args: Any, grad: bool = True, **kwargs: Any) -> list[Forward]:
    found: list[Forward] = []
    handle = tap_forward(model, found.append, lambda where, work: work())
    with torch.set_grad_enabled(grad):
        model(*args, **kwargs)
    handle.remove()
    model(*args, **kwargs)
    return found


def test_a_causal_model_scores_each_position_on_the_next_label() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    (forward,) = seen(ToyForCausalLM(), torch.randn(2, 3, 4), labels=labels)
    assert forward.logits is not None
    assert forward.logits.shape == (2, 2, 7)
    assert forward.targets is not None
    assert forward.targets.tolist() == [[2, 3], [5, -100]]
    assert not forward.logits.requires_grad
    assert forward.loss is not None
    assert not forward.loss.requires_grad
    assert not forward.loss_is_sum


def test_any_other_model_scores_each_position_on_its_own_label() -> None:
    labels = torch.tensor([[1, 2, 3]])
    (forward,) = seen(ToyForTokenClassification(), torch.randn(1, 3, 4), labels=labels)
    assert forward.targets is not None
    assert forward.targets.tolist() == [[1, 2, 3]]


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
    assert forward.logits is None
    assert forward.targets is None
    assert forward.loss is not None


def test_labels_that_are_no_classes_are_left_alone() -> None:
    model = ToyForTokenClassification()
    (regression,) = seen(model, torch.randn(2, 4), labels=torch.randn(2))
    assert regression.logits is None
    (other,) = seen(model, torch.randn(2, 4), labels=torch.zeros(5, dtype=torch.long))
    assert other.logits is None


def test_outputs_that_are_not_ours_to_read_are_left_alone() -> None:
    assert seen(nn.Linear(3, 2), torch.randn(4, 3)) == []


def test_a_mapping_is_read_like_an_object() -> None:
    class Mapped(ToyForCausalLM):
        def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            return {"logits": self.head(x), "loss": torch.tensor(1.0)}

    labels = torch.zeros(1, 3, dtype=torch.long)
    (forward,) = seen(Mapped(), torch.randn(1, 3, 4), labels=labels)
    assert forward.logits is not None


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
    assert forward.targets is not None
    assert forward.targets.tolist() == ([[2, 3]] if shifted else [[1, 2, 3]])


def test_a_wrapped_model_is_aligned_as_the_one_within() -> None:
    labels = torch.tensor([[1, 2, 3]])
    wraps: list[Any] = [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
    for wrap in wraps:
        (forward,) = seen(wrap(ToyForCausalLM()), torch.randn(1, 3, 4), labels=labels)
        assert forward.targets is not None
        assert forward.targets.tolist() == [[2, 3]]


def test_labels_that_the_model_was_not_given_can_be_told() -> None:
    found: list[Forward] = []
    model, labels = ToyForCausalLM(), torch.tensor([[1, 2, 3]])
    tap_forward(model, found.append, lambda where, work: work(), lambda: labels)
    model(torch.randn(1, 3, 4))
    assert found[0].targets is not None
    assert found[0].targets.tolist() == [[2, 3]]


def test_a_tapped_model_can_be_saved_and_its_copies_are_not_tapped() -> None:
    found: list[Forward] = []
    model = ToyForCausalLM()
    tap_forward(model, found.append, lambda where, work: work())
    saved = BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    torch.load(saved, weights_only=False)(torch.randn(1, 3, 4))
    deepcopy(model)(torch.randn(1, 3, 4))
    assert found == []
    model(torch.randn(1, 3, 4))
    assert len(found) == 1
