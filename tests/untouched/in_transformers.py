"""Trainings with Hugging Face Trainer and TRL."""

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PrinterCallback, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from untouched import tiny
from untouched.trainings import STEPS, Outcome, Watch, gradient_scaler, training

from entropylens_callbacks.transformers import attach

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": STEPS,
    "per_device_train_batch_size": tiny.BATCH,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "lr_scheduler_type": "linear",
}
TRL: dict[str, Any] = {**COMMON, "bf16": False, "gradient_checkpointing": False}


def trained(watch: Watch | None, folder: Path, trainer: Any, **attached: Any) -> Outcome:
    trainer.remove_callback(PrinterCallback)
    if watch is not None:
        attach(trainer, folder / "run", **watch, **attached)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    logged = ("loss", "grad_norm", "learning_rate", "entropy", "eval_loss")
    losses = [e[k] for e in trainer.state.log_history for k in logged if k in e]
    run_dir = folder / "run" if watch else None
    return Outcome(trainer.model, [trainer.optimizer], [trainer.lr_scheduler], losses, run_dir)


def hf(folder: Path, model: Any = None, samples: Any = None, **options: Any) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(
            model or tiny.llama(),
            args=TrainingArguments(str(folder / "out"), **{**COMMON, **options}),
            train_dataset=samples or tiny.token_samples(),
            eval_dataset=tiny.token_samples()[:8],
        )


@training("transformers", "usual")
def usual(watch: Watch | None, folder: Path) -> Outcome:
    trainer = hf(folder, eval_strategy="steps", eval_steps=5)
    return trained(watch, folder, trainer, **({"sample_id": "name"} if watch else {}))


@training("transformers", "grouped by length")
def grouped(watch: Watch | None, folder: Path) -> Outcome:
    rows = [{**s, "length": number % 7} for number, s in enumerate(tiny.token_samples())]
    samples = Dataset.from_list([{k: v for k, v in row.items() if k != "name"} for row in rows])
    options = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    trainer = hf(folder, samples=samples, **options)
    trainer.compute_loss = _without_length(trainer.compute_loss)
    return trained(watch, folder, trainer, **({"sample_id": "index"} if watch else {}))


def _without_length(compute_loss: Any) -> Any:
    def shorn(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rest = {name: value for name, value in inputs.items() if name != "length"}
        return compute_loss(model, rest, *args, **kwargs)

    return shorn


@training("transformers", "saving checkpoints")
def saving(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, save_strategy="steps", save_steps=4))


@training("transformers", "accumulation")
def accumulation(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, gradient_accumulation_steps=3))


def _scaled(watch: Watch | None, folder: Path, optimizer: str) -> Outcome:
    """A real scaler, which accelerate leaves out on a CPU."""
    trainer = hf(folder, optim=optimizer)
    trainer.accelerator.scaler = gradient_scaler(torch.float16)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        return trained(watch, folder, trainer)
    finally:
        AcceleratorState._reset_state()


@training("transformers", "gradient scaler")
def scaled(watch: Watch | None, folder: Path) -> Outcome:
    return _scaled(watch, folder, "adamw_torch")


@training("transformers", "gradient scaler, fused")
def scaled_fused(watch: Watch | None, folder: Path) -> Outcome:
    return _scaled(watch, folder, "adamw_torch_fused")


@training("transformers", "gradient checkpointing")
def checkpointed(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, gradient_checkpointing=True))


@training("transformers", "compiled")
def compiled(watch: Watch | None, folder: Path) -> Outcome:
    trainer = hf(folder, torch_compile=True, torch_compile_backend="aot_eager")
    try:
        return trained(watch, folder, trainer)
    finally:
        AcceleratorState._reset_state()


@training("transformers", "peft")
def peft(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, tiny.lora(tiny.llama())))


@training("transformers", "label smoothing")
def smoothed(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, label_smoothing_factor=0.1))


@training("transformers", "sequence classification")
def classified(watch: Watch | None, folder: Path) -> Outcome:
    samples = [
        {"input_ids": s["input_ids"], "labels": i % tiny.CLASSES}
        for i, s in enumerate(tiny.token_samples())
    ]
    return trained(watch, folder, hf(folder, tiny.classifier(), samples))


@training("transformers", "encoder-decoder")
def encoder_decoder(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, hf(folder, tiny.bart()))


def sft(folder: Path, peft_config: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SFTTrainer(
            tiny.llama(),
            args=SFTConfig(str(folder / "out"), **{**TRL, **options}),
            train_dataset=tiny.prompts_and_completions(),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config,
        )


def dpo(folder: Path, peft_config: Any = None, callbacks: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            tiny.llama(),
            ref_model=None if peft_config else tiny.llama(),
            args=DPOConfig(str(folder / "out"), **{**TRL, **options}),
            train_dataset=tiny.preferences(),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config,
            callbacks=callbacks,
        )


def right(completions: list[str], **known: Any) -> list[float]:
    """Half of all completions are right."""
    return [float(len(text) % 2) for text in completions]


def brief(completions: list[str], **known: Any) -> list[float | None]:
    """A second component, which does not apply to everything."""
    return [None if text.startswith("1") else len(text) / 10 for text in completions]


_ROLLOUTS: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 6,
    "per_device_train_batch_size": 8,
}


def _saved(folder: Path, model: Any) -> Any:
    """A model with a path: the reference model is loaded from there."""
    # save_pretrained writes on one rank alone.
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    (base / "config.json").write_text(model.config.to_json_string())
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(base)


def grpo(
    folder: Path, peft_config: Any = None, model: Any = None, rewards: Any = None, **options: Any
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GRPOTrainer(
            _saved(folder, model or tiny.llama()),
            reward_funcs=rewards or [right, brief],
            args=GRPOConfig(str(folder / "out"), **{**TRL, **_ROLLOUTS, **options}),
            train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config,
        )


def rloo(folder: Path, peft_config: Any = None, model: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RLOOTrainer(
            _saved(folder, model or tiny.llama()),
            reward_funcs=[right, brief],
            args=RLOOConfig(str(folder / "out"), **{**TRL, **_ROLLOUTS, **options}),
            train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config,
        )


def kto(folder: Path, peft_config: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KTOTrainer(
            _saved(folder, tiny.llama()),
            args=KTOConfig(str(folder / "out"), **{**TRL, **options}),
            train_dataset=tiny.judged(),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config,
        )


def reward(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RewardTrainer(
            tiny.scorer(),
            args=RewardConfig(str(folder / "out"), **{**TRL, **options}),
            train_dataset=tiny.preferences(),
            processing_class=tiny.tokenizer(),
        )


@training("trl", "grpo")
def grpo_usual(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, grpo(folder, beta=0.1))


@training("trl", "grpo, off-policy accumulation")
def grpo_accumulated(watch: Watch | None, folder: Path) -> Outcome:
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
    return trained(watch, folder, grpo(folder, **options))


@training("trl", "grpo, peft")
def grpo_peft(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, grpo(folder, tiny.lora_config(), beta=0.1))


@training("trl", "rloo")
def rloo_usual(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, rloo(folder))


@training("trl", "kto")
def kto_usual(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, kto(folder))


@training("trl", "reward")
def reward_usual(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, reward(folder))


@training("trl", "sft")
def sft_usual(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, sft(folder))


@training("trl", "sft, peft")
def sft_peft(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, sft(folder, tiny.lora_config()))


@training("trl", "sft, packed")
def sft_packed(watch: Watch | None, folder: Path) -> Outcome:
    options = {"packing": True, "max_length": 24, "per_device_train_batch_size": 1}
    return trained(watch, folder, sft(folder, **options))


@training("trl", "sft, accumulation")
def sft_accumulation(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, sft(folder, gradient_accumulation_steps=2))


@training("trl", "sft, gradient checkpointing")
def sft_checkpointed(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, sft(folder, gradient_checkpointing=True))


@training("trl", "sft, compiled")
def sft_compiled(watch: Watch | None, folder: Path) -> Outcome:
    trainer = sft(folder, torch_compile=True, torch_compile_backend="aot_eager")
    try:
        return trained(watch, folder, trainer)
    finally:
        AcceleratorState._reset_state()


@training("trl", "dpo")
def dpo_usual(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, dpo(folder))


@training("trl", "dpo, peft")
def dpo_peft(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, dpo(folder, tiny.lora_config()))


@training("trl", "dpo, accumulation")
def dpo_accumulation(watch: Watch | None, folder: Path) -> Outcome:
    return trained(watch, folder, dpo(folder, gradient_accumulation_steps=2))
