"""Projected rows must be the logits that the model itself would build."""

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from untouched import tiny

from entropylens.capture.head import backbone_of, bare, head_of, vocabulary_of
from entropylens.diagnostics.token_statistics import token_statistics, token_statistics_from_hidden

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere, scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)),
    "granite, divisor": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
    "phi, bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ),
    "peft": lambda: tiny.lora(LlamaForCausalLM(LlamaConfig(**SMALL))),
}


@pytest.mark.parametrize("name", MODELS)
def test_projected_hidden_states_have_the_statistics_of_the_models_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # far from uniform, so that a cap or a scale shows
    if name == "phi, bias":
        model.lm_head.bias.data.normal_()
    tokens = torch.randint(3, 37, (2, 9))
    hidden: list[torch.Tensor] = []
    backbone = backbone_of(model)
    assert backbone is not None
    backbone.register_forward_hook(lambda *parts: hidden.append(parts[-1].last_hidden_state))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    head = head_of(model)
    assert head is not None
    found = token_statistics_from_hidden(
        hidden[0],
        head.weight,
        tokens,
        bias=head.bias,
        soft_cap=head.soft_cap,
        logit_scale=head.logit_scale,
    )
    expected = token_statistics(logits, tokens)
    assert torch.allclose(found.entropy, expected.entropy, atol=1e-5)
    assert torch.allclose(found.varentropy, expected.varentropy, atol=1e-5)
    assert torch.allclose(found.logprob, expected.logprob, atol=1e-5)
    assert expected.entropy.std() > 1e-4
    assert vocabulary_of(model) == head.weight.shape[0] == 37


def test_a_model_without_a_head_or_with_one_that_cannot_be_multiplied_has_none() -> None:
    assert head_of(torch.nn.Linear(2, 2)) is None
    assert backbone_of(torch.nn.Linear(2, 2)) is None
    assert vocabulary_of(torch.nn.Linear(2, 2)) == 0
    model = MODELS["llama"]()
    model.lm_head = torch.nn.Module()
    model.lm_head.weight = torch.zeros(37, 16, dtype=torch.uint8)
    assert head_of(model) is None


def test_wrappers_are_seen_through() -> None:
    model = MODELS["llama"]()
    compiled: Any = torch.compile(torch.nn.DataParallel(model), backend="eager")
    assert bare(compiled) is model
    assert bare(tiny.lora(model)) is not None
