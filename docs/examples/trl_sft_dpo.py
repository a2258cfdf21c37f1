"""TRL: supervised fine-tuning, then preference optimisation, through heads that build no logits."""

import random

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import entropylens as el
from entropylens_callbacks.transformers import attach

letters = {letter: code for code, letter in enumerate(["<pad>", "<eos>", *"0123456789+="])}
tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
tokenizer.decoder = decoders.Fuse()
processing = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
)


def additions(count: int) -> list[dict[str, str]]:
    drawn, rows = random.Random(0), []
    for _ in range(count):
        one, other = drawn.randint(1, 49), drawn.randint(1, 49)
        wrong = str(one + other + drawn.choice([-10, -1, 1, 10]))
        rows.append({"prompt": f"{one}+{other}=", "right": str(one + other), "wrong": wrong})
    return rows


def settings(kind: type, folder: str, steps: int, rate: float) -> SFTConfig | DPOConfig:
    return kind(
        f"out/{folder}",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=rate,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    rows = additions(1000)
    sft = SFTTrainer(
        model,
        args=settings(SFTConfig, "sft", 60, 3e-3),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["right"]} for row in rows]
        ),
        processing_class=processing,
    )
    attach(sft, "runs/sft", preset="full")
    sft.train()

    model.save_pretrained("out/base")
    dpo = DPOTrainer(
        model,
        ref_model=LlamaForCausalLM.from_pretrained("out/base", dtype=torch.float32),
        args=settings(DPOConfig, "dpo", 30, 3e-4),
        train_dataset=Dataset.from_list(
            [{"prompt": r["prompt"], "chosen": r["right"], "rejected": r["wrong"]} for r in rows]
        ),
        processing_class=processing,
    )
    attach(dpo, "runs/dpo", preset="full", sample_id="index")
    dpo.train()

    for name, trainer in (("sft", sft), ("dpo", dpo)):
        ours = el.open_run(f"runs/{name}").metrics("entropy/token/mean").to_pandas()
        theirs = {e["step"]: e["entropy"] for e in trainer.state.log_history if "entropy" in e}
        # TRL logs the mean over its logging interval.
        means = {s: ours[(ours.step > s - 5) & (ours.step <= s)].value.mean() for s in theirs}
        gap = max(abs(theirs[step] - means[step]) for step in theirs)
        print(f"{name}: entropy {ours.value.iloc[0]:.3f} to {ours.value.iloc[-1]:.3f} nats, within "
              f"{gap:.0e} of TRL's own")  # fmt: skip


if __name__ == "__main__":
    main()
