"""GKT in Hugging Face's Trainer. huggingface_trainer_plain.py is the same without.

python examples/huggingface_trainer.py
"""

from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    set_seed,
)

from gkt_fast import GKTConfig
from gkt_fast.data import digits
from gkt_fast.integrations.huggingface import Trainer


class Examples(Dataset):
    """(image, class) pairs, as a dataset of transformers hands them out."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.pairs[index]
        return {"pixel_values": image, "labels": label}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    set_seed(0)
    data = digits(320)
    config = ResNetConfig(
        num_channels=data.in_channels,
        num_labels=data.num_classes,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[2, 2, 2],
        layer_type="basic",
    )
    arguments = TrainingArguments(
        "huggingface_run",
        num_train_epochs=2,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=500,
        learning_rate=3e-3,
        save_strategy="epoch",
        eval_strategy="epoch",
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        ResNetForImageClassification(config),
        arguments,
        gkt=GKTConfig(groups=3),
        train_dataset=Examples(data.train),
        eval_dataset=Examples(data.test),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model("huggingface_run/model")
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
