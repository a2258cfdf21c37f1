"""Tiny models and data for trainings that take a fraction of a second."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CLASSES = 5
VOCABULARY = {c: i for i, c in enumerate(["<pad>", "<eos>", *"0123456789+-=,>: "])}
BATCH, LENGTH = 4, 12


def llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )


def llama() -> Any:
    return LlamaForCausalLM(llama_config())


def classifier() -> Any:
    return LlamaForSequenceClassification(llama_config(num_labels=CLASSES))


def scorer() -> Any:
    return LlamaForSequenceClassification(llama_config(num_labels=1))


def bart() -> Any:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(VOCABULARY),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=1,
        )
    )


def lora(model: Any, **options: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, lora_config(**options))


def lora_config(**options: Any) -> Any:
    from peft import LoraConfig

    targets = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    return LoraConfig(task_type="CAUSAL_LM", **targets, **options)


class Perceptron(nn.Module):
    """A classifier whose logits a loop shows by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tokenizer() -> Any:
    found = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    found.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def sums(count: int = 64) -> list[dict[str, Any]]:
    """Additions, right answers and wrong ones, in lengths that differ."""
    drawn = random.Random(0)
    rows = []
    for number in range(count):
        one, other = drawn.randint(1, 999), drawn.randint(1, 99)
        row = {"prompt": f"{one}+{other}=", "completion": str(one + other)}
        rows.append({**row, "rejected": str(drawn.randint(1, 9)), "name": f"sum {number}"})
    return rows


def prompts_and_completions() -> Dataset:
    return Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in sums()])


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": r["prompt"]} for r in sums()])


def judged() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": r[name], "label": name == "completion"}
            for r in sums()
            for name in ("completion", "rejected")
        ]
    )


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["rejected"]}
            for r in sums()
        ]
    )


def token_batches(seed: int = 1) -> Iterator[Tensor]:
    """``[B, T]`` of tokens, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(2, len(VOCABULARY), (BATCH, LENGTH), generator=generator)


def class_batches(seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and classes, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        features = torch.randn(BATCH, 8, generator=generator)
        yield features, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def token_samples(count: int = 64) -> list[dict[str, Any]]:
    batches = token_batches()
    rows = [row for _ in range(count // BATCH) for row in next(batches).tolist()]
    made = []
    for number, row in enumerate(rows):
        labels = [-100] * (number % 5) + row[number % 5 :]
        made.append({"input_ids": row, "labels": labels, "name": f"sample {number}"})
    return made
