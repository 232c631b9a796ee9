"""The examples of GKT in other people's training loops, and the README's diff of such a loop.

Lightning and Hugging Face get a process of their own, since they leave global settings behind.
"""

from __future__ import annotations

import difflib
import json
import re
import runpy

import pytest
import torch
from helpers.documents import ROOT, fenced_blocks
from helpers.processes import run_script
from safetensors.torch import load_file


def numbers(pattern: str, text: str) -> list[float]:
    found = [float(number) for number in re.findall(pattern + r" ([\d.e+-]+)", text)]
    assert found, f"{pattern} is not in {text}"
    return found


PAIRS = {
    "timm": ("timm_plain.py", "timm_task.py"),
    "huggingface": ("huggingface_trainer_plain.py", "huggingface_trainer.py"),
    "lightning": ("lightning_plain.py", "lightning_module.py"),
    "accelerate": ("huggingface_accelerate_plain.py", "huggingface_accelerate.py"),
}
"""For each library's page the script as it is written for the library, and the same with GKT."""


def body_of(script: str) -> list[str]:
    """Without the docstring, which says what the script is."""
    return (ROOT / "examples" / script).read_text().partition('\n"""\n')[2].splitlines()


@pytest.mark.parametrize("library", PAIRS)
def test_each_page_shows_exactly_what_the_librarys_script_changes(library):
    lines = difflib.unified_diff(*map(body_of, PAIRS[library]), n=1, lineterm="")
    expected = ["@@" if line.startswith("@@") else line.rstrip() for line in lines][2:]
    page = (ROOT / "docs" / "guide" / f"{library}.md").read_text()
    (shown,) = [block for block in fenced_blocks(page) if block.language == "diff"]
    assert [line.rstrip() for line in shown.text.splitlines()] == expected


@pytest.mark.parametrize("library", PAIRS)
def test_the_scripts_without_gkt_run(library, tmp_path):
    assert run_script(f"examples/{PAIRS[library][0]}", folder=tmp_path)


def code_of(script: str) -> list[str]:
    """Without the first line, which says what the script is."""
    return (ROOT / "examples" / script).read_text().splitlines()[1:]


def test_the_readme_shows_exactly_what_a_bare_loop_changes():
    lines = difflib.unified_diff(code_of("bare_plain.py"), code_of("bare_gkt.py"), n=1, lineterm="")
    expected = ["@@" if line.startswith("@@") else line.rstrip() for line in lines][2:]
    shown = [block for block in fenced_blocks((ROOT / "README.md").read_text()) if block.language == "diff"]
    assert len(shown) == 1
    assert [line.rstrip() for line in shown[0].text.splitlines()] == expected
    changed = [line for line in expected if line[:1] in ("+", "-") and line[1:].strip()]
    assert len(changed) <= 10


@pytest.mark.parametrize("script", ["bare_plain.py", "bare_gkt.py"])
def test_bare_loop(script, capsys):
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    printed = capsys.readouterr().out
    losses = numbers("loss", printed)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    if script == "bare_gkt.py":
        assert numbers("half of the blocks: accuracy", printed)[0] > 50  # ten classes


def test_timm_task(capsys):
    runpy.run_path(str(ROOT / "examples" / "timm_task.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses, distillation = numbers(" loss", printed), numbers("kd_loss", printed)
    assert losses[-1] < losses[0]
    assert all(value > 0 for value in distillation)
    assert numbers("averaged weights: top1", printed)


def test_timm_task_in_timms_checkpoints(tmp_path):
    import timm

    from gkt_fast import GKTConfig
    from gkt_fast.integrations.timm import GKTTask

    def make() -> GKTTask:
        return GKTTask(timm.create_model("resnet18", num_classes=3), config=GKTConfig())

    task = make()
    task.setup_ema(decay=0.5)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    for _ in range(2):
        task(images, targets)["loss"].backward()
        task.update_ema()
    torch.save(task.get_checkpoint_state() | task.get_checkpoint_state(ema=True), tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state["state_dict"].keys() == timm.create_model("resnet18").state_dict().keys()
    assert state["state_dict_ema"].keys() == state["state_dict"].keys()
    again = make()
    again.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert again.trainable_module.next_step == 2
    assert torch.equal(again.trainable_module.model.fc.weight, task.trainable_module.model.fc.weight)


def test_lightning_module(tmp_path):
    printed = run_script("examples/lightning_module.py", folder=tmp_path)
    assert "after 20 steps" in printed
    assert numbers("'train_kd':", printed)[0] > 0
    assert numbers("'val_accuracy':", printed)[0] > 0.3
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["gkt._extra_state"][0] == 20


def test_huggingface_trainer(tmp_path):
    printed = run_script("examples/huggingface_trainer.py", folder=tmp_path)
    losses = numbers("'loss': '", printed.replace("'loss': '", "'loss': ' "))
    assert losses[-1] < losses[0]
    assert numbers("accuracy", printed.splitlines()[-1])[0] > 15
    folder = tmp_path / "huggingface_run"
    saved, checkpoint = load_file(folder / "model" / "model.safetensors"), folder / "checkpoint-20"
    assert load_file(checkpoint / "model.safetensors").keys() == saved.keys()
    assert json.loads((folder / "model" / "config.json").read_text())["architectures"] == [
        "ResNetForImageClassification"
    ]


def test_huggingface_accelerate(tmp_path):
    printed = run_script("examples/huggingface_accelerate.py", folder=tmp_path)
    assert numbers("accuracy", printed)[-1] > 30
    state = load_file(tmp_path / "accelerate_run" / "model.safetensors")
    assert state["_extra_state"][0] == 20  # optimizer steps, of two batches each
