"""A PEFT model in the Hugging Face Trainer, with its LoRA layers on the kernels of fedms_ext: one line more.

python peft_trainer.py [--plain] [--samples 400]      --plain leaves the line out, to compare

MiniLM, which comes with a package, learns to tell questions from statements made up here.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time

import peft
import torch
import transformers
from fedms.models.minilm import model_folder

import fedms_ext

SUBJECTS, VERBS, THINGS = ("he", "she", "it", "Ann"), ("sees", "likes", "finds"), ("the film", "a dog", "the news")


def sentence(draw: random.Random) -> tuple[str, int]:
    subject, verb, thing = draw.choice(SUBJECTS), draw.choice(VERBS), draw.choice(THINGS)
    if draw.random() < 0.5:
        return f"does {subject} {verb[:-1]} {thing}", 1
    return f"{subject} {verb} {thing}", 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="PEFT alone")
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    transformers.set_seed(0)

    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules="all-linear"))
    if not arguments.plain:
        print(fedms_ext.accelerate(model))

    draw = random.Random(0)
    texts, labels = zip(*(sentence(draw) for _ in range(arguments.samples)))
    encoded = tokenizer(list(texts))
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(encoded["input_ids"], labels)]
    with tempfile.TemporaryDirectory() as out:
        settings = transformers.TrainingArguments(
            out, num_train_epochs=2, per_device_train_batch_size=32, learning_rate=2e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=data, processing_class=tokenizer)
        started = time.perf_counter()
        loss = trainer.train().training_loss
    print(f"mean training loss {loss:.3f}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
