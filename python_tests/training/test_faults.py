"""What goes wrong in long runs: kills, full disks, losses that are NaN, loaders that die, files that are no images."""

from __future__ import annotations

import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import environment
from helpers.small_nets import CLASSES, Net
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gkt_fast import CheckpointError, DataLoadingError, GKTConfig, GKTTrainer, NonFiniteLossError
from gkt_fast.data import load_data
from gkt_fast.training.checkpoint import load_checkpoint, remove_temporary_files, save_checkpoint

CONFIG = GKTConfig(groups=2, loops=2)


def make(**options) -> GKTTrainer:
    net = Net()
    return GKTTrainer(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), CONFIG, **options)


def part(seed: int = 0, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


WRITER = """
import os, sys, torch
from gkt_fast.training.checkpoint import save_checkpoint

folder = sys.argv[1]
torch.set_num_threads(1)
for line in sys.stdin:  # one child for every line, forked before anything started a thread
    child = os.fork()
    if child == 0:
        number = int(line)
        while True:
            number += 1
            state = {"number": number, "weights": torch.full((100_000,), float(number))}
            save_checkpoint(f"{folder}/last.pt", state, copy_to=f"{folder}/best.pt" if number % 2 else None)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signals")
def test_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    draw = random.Random(0)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    last, leftovers = 0, 0
    try:
        for _ in range(50):
            writer.stdin.write(f"{last}\n")
            writer.stdin.flush()
            child = int(writer.stdout.readline())
            time.sleep(draw.uniform(0.01, 0.06))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            leftovers += len(list(tmp_path.glob(".*.tmp")))
            for name in ("last.pt", "best.pt"):
                path = tmp_path / name
                if not path.exists():
                    continue
                state = load_checkpoint(path)
                assert torch.equal(state["weights"], torch.full((100_000,), float(state["number"])))
                if name == "last.pt":
                    assert state["number"] >= last
                    last = state["number"]
    finally:
        writer.kill()
        writer.wait()
    assert last > 20, "too few checkpoints were written to be killed in between"
    assert leftovers, "no kill came in the middle of a checkpoint"
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}


def test_fit_clears_away_what_a_killed_run_left(tmp_path):
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    make().fit([part()], epochs=1, output_dir=tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.tmp",
        "last.pt",
        "summary.csv",
        "config.yaml",
    }


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from test_faults import make, part
from gkt_fast import CheckpointError

folder = Path(sys.argv[1])
trainer = make()
trainer.fit([part()], epochs=1, output_dir=folder, progress=False)
good = (folder / "last.pt").read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 1000, len(good) // 2, len(good) - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.fit([part()], epochs=trainer.epoch + 1, output_dir=None, progress=False)
        from gkt_fast.training.checkpoint import save_checkpoint
        save_checkpoint(folder / "last.pt", trainer.state_dict(), copy_to=folder / "best.pt")
    except CheckpointError as error:
        sys.stderr.write(f"{error}\\n")
    else:
        sys.exit("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert (folder / "last.pt").read_bytes() == good
assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "last.pt", "summary.csv"]
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of the kernel")
def test_a_full_disk_is_an_error_that_keeps_the_old_checkpoint(tmp_path):
    """A limit on the size of files, which the kernel holds a process to as it does a disk."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(f"{tmp_path}/last.pt can't be written (")
        assert line.endswith("File too large); an earlier checkpoint is kept")


def test_an_error_of_the_state_is_not_taken_for_the_disks(tmp_path):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(tmp_path / "last.pt", {"x": lambda: 0})
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    save_checkpoint(tmp_path / "last.pt", {"number": 3}, copy_to=tmp_path / "best.pt")
    assert load_checkpoint(tmp_path / "best.pt")["number"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}


class BreaksSubnets(Net):
    """The logits are NaN where the last block is dropped."""

    broken = False

    def forward(self, x):
        x = self.stem(x)
        before = None
        for block in self.blocks:
            before, x = x, block(x)
        logits = self.head(x.mean((2, 3)))
        return logits * math.nan if self.broken and before is x else logits


def test_a_nan_loss_names_the_step_and_the_streams(tmp_path):
    net = BreaksSubnets()
    config = CONFIG.replace(execution="sequential", sampler="fixed", subnets=((4,), (3,), (4,), (4,)))
    trainer = GKTTrainer(net, torch.optim.SGD(net.parameters(), 0.1), config)
    trainer.fit([part(), part(1)], epochs=1, output_dir=tmp_path, progress=False)
    good = (tmp_path / "last.pt").read_bytes()
    net.broken = True
    # Group 2 of the first loop is broken, and with it what it leaves for its average in the second.
    message = (
        r"^the loss is not finite at step 2 \(epoch 2\) in loop 1 group 2 \(3\); checkpoints written before"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.fit([part(), part(1)], epochs=2, output_dir=tmp_path, resume=False, progress=False)
    assert (tmp_path / "last.pt").read_bytes() == good


class Mortal(Dataset):
    """The process that loads the sixth sample kills itself."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 5 and torch.utils.data.get_worker_info() is not None:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("of the data set's own")
        return part(index, 1)[0][0], 0


DEAD_WORKER = """
import sys
from torch.utils.data import DataLoader
from test_faults import Mortal, make

make().fit(DataLoader(Mortal("kill"), 2, num_workers=1), epochs=2, output_dir=sys.argv[1], progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signals")
def test_a_worker_that_dies_ends_training_with_its_error_and_the_checkpoint_kept(tmp_path):
    """In a process of its own: torch may tell of the death a second time, at any moment."""
    make().fit(DataLoader(Mortal("kill"), 2), epochs=1, output_dir=tmp_path, progress=False)
    good = (tmp_path / "last.pt").read_bytes()
    result = subprocess.run(
        [sys.executable, "-c", DEAD_WORKER, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert re.search(
        r"DataLoadingError: DataLoader worker \(pid.* \d+\) (is killed by signal: Killed|exited unexpectedly), "
        r"at batch \d of epoch 2; training can go on from the last checkpoint\n",
        result.stderr,
    ), result.stderr
    assert (tmp_path / "last.pt").read_bytes() == good


def test_an_error_of_the_data_set_stays_what_it_is():
    with pytest.raises(RuntimeError, match="of the data set's own") as error:
        make().fit(DataLoader(Mortal("raise"), 2, num_workers=1), epochs=1, progress=False)
    assert not isinstance(error.value, DataLoadingError)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image", b"cut"])
def test_a_corrupted_image_is_named_by_its_path(tmp_path, workers, content):
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (9, 200, 30)).save(tmp_path / split / name / "0.png")
    bad = tmp_path / "train" / "b" / "1.png"
    whole = (tmp_path / "train" / "b" / "0.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    data = load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(ValueError, match=rf"{bad} can't be read as an image: "):
        list(DataLoader(data.train, 3, num_workers=workers))
    assert len(list(DataLoader(data.test, 2))) == 1


class Malicious:
    def __init__(self, call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def executing(path: Path, how: str) -> object:
    """An object that leaves a mark at `path` when it is unpickled by a reader that executes what it reads."""
    return {
        "call": Malicious((os.mkdir, (str(path),))),
        "eval": Malicious((eval, (f"__import__('os').mkdir({str(path)!r})",))),
        "module": nn.Linear(1, 1),
        "shell": Malicious((os.system, (f"mkdir {path}",))),
    }[how]


@pytest.mark.parametrize("how", ["call", "eval", "module", "shell"])
@pytest.mark.parametrize("zipped", [True, False])
def test_loading_never_executes_code(tmp_path, how, zipped):
    """In torch's zip format and its old one, and at any depth."""
    state = {"format": 2, "model": {"weight": torch.ones(2), "x": [executing(tmp_path / "mark", how)]}}
    torch.save(state, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"last\.pt can't be read"):
        make().fit([part()], epochs=1, output_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"last\.pt can't be read"):
        make().load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "mark").exists()
    if how != "module":
        torch.load(tmp_path / "last.pt", weights_only=False)  # or the test would pass with a harmless object
        assert (tmp_path / "mark").exists()
