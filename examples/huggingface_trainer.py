"""GKT with Hugging Face's Trainer and a model of transformers.

python examples/huggingface_trainer.py
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from gkt_fast import GKT, GKTConfig
from gkt_fast.data import digits


class GKTForImageClassification(nn.Module):
    """What Trainer calls: in training the loss of GKT, else the model's own output. Checkpoints hold the model.

    Args:
        model: an image classifier of transformers.
        config: GKT's hyper-parameters.
    """

    def __init__(self, model: nn.Module, config: GKTConfig) -> None:
        super().__init__()
        self.gkt = GKT(model, config)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        if not self.training:
            return self.gkt.model(pixel_values, labels=labels)
        output = self.gkt(pixel_values, labels)
        return {"loss": output.loss, "logits": output.logits}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.gkt.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.gkt.model.load_state_dict(*args, **kwargs)


class StepCounter(TrainerCallback):
    """Lets GKT draw the subnets of the trainer's step, also after a resume."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].gkt.next_step = state.global_step


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
    model = GKTForImageClassification(ResNetForImageClassification(config), GKTConfig(groups=3))
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
        model,
        arguments,
        train_dataset=Examples(data.train),
        eval_dataset=Examples(data.test),
        compute_metrics=compute_metrics,
        callbacks=[StepCounter()],
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"accuracy {100 * accuracy:.1f} %")
        model.gkt.model.save_pretrained("huggingface_run/model")


if __name__ == "__main__":
    main()
