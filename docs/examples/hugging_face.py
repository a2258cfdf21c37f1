"""Hugging Face Trainer: one line, TensorBoard beside it, a checkpoint and its resumption."""

from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import entropylens as el
from entropylens_callbacks.transformers import attach

LENGTH = 48
text = "\n".join(topics.values())[:100_000]
letters = sorted(set(text))
samples = []
for start in range(0, len(text) - LENGTH, LENGTH):
    window = [letters.index(letter) for letter in text[start : start + LENGTH]]
    samples.append({"input_ids": window, "labels": window, "place": f"letter {start}"})


def trainer(steps: int) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    arguments = TrainingArguments(
        "out/hugging_face",
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=20,
        eval_strategy="steps",
        eval_steps=20,
        report_to="tensorboard",
        disable_tqdm=True,
        seed=0,
    )
    return Trainer(model, args=arguments, train_dataset=samples, eval_dataset=samples[:32])


def main() -> None:
    first = trainer(40)
    attach(first, "runs/hugging_face", sample_id="place", preset="full")
    first.train()

    # Another process, another day: the checkpoint knows which run it belongs to.
    second = trainer(60)
    attach(second, "runs/hugging_face", sample_id="place", preset="full")
    second.train(resume_from_checkpoint="out/hugging_face/checkpoint-40")

    run = el.open_run("runs/hugging_face")
    losses = run.metrics("loss/mean", phases="train").to_pandas()
    worst = run.samples().to_pandas().sort_values("loss").iloc[-1]
    print(f"{len(losses)} steps, each once; loss {losses.value.iloc[0]:.2f} to "
          f"{losses.value.iloc[-1]:.2f}; {len(run.attempts)} attempts; the highest loss was "
          f"{worst.loss:.2f}, of {worst.sample_id!r} at step {worst.step}")  # fmt: skip


if __name__ == "__main__":
    main()
