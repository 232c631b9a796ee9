"""What pages tell readers to do works: README.md and all of docs/.

Python blocks are executed. Those of the first pages know only `train_loader` and `val_loader`, the reader's data; those
of the guide also a model and what goes with it, and what earlier blocks of the page made. Commands that install or run
everything are checked to name what exists; all others are executed with their own flags, followed by flags that make
them small. A command of no known kind fails the test.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.documents import ROOT, Block, Command, extras, fenced_blocks, make_targets, shell_commands
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import gkt_fast
from gkt_fast import GKT, GKTConfig
from gkt_fast.models import cifar_resnet

FIRST_PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/get-started/*.md"))]
PAGES = [*FIRST_PAGES, *sorted(set(ROOT.glob("docs/**/*.md")) - set(FIRST_PAGES))]
"""Whose blocks and commands are run."""
PYTHON = ("python", "py")
SHELL = ("sh", "bash", "shell", "console")
SHOWN = ("", "text", "yaml", "csv", "bibtex", "mermaid", "diff")
"""Languages of blocks that are only there to be read."""

SMALL = {
    "gkt_fast env": "",
    "gkt_fast selfcheck": "--device cpu",
    "gkt_fast train": "--epochs 1 -b 20 --image-size 32 -j 0 --device cpu --output {tmp}/runs",
    "gkt_fast plot": "-o {tmp}/plot.png",
    "gkt_fast subnets": "--max-subnets 2 --device cpu",
    "gkt_fast elastic": "--max-depths 2 --device cpu",
    "gkt_fast predict": "",
    "bench/throughput.py": "--model cifar_resnet20 --batch-size 2 --repeats 1 --modes shared stacked "
    "--csv {tmp}/throughput.csv",
    "bench/scaling.py": "--model cifar_resnet20 --batch-size 2 --repeats 1 --csv {tmp}/scaling.csv",
    "bench/floor.py": "--model cifar_resnet20 --batch-size 2 --steps 1 --repeats 1 --csv {tmp}/floor.csv",
    "bench/alternatives.py": "--batch-size 2 --repeats 1 --csv {tmp}/alternatives.csv",
    "bench/accuracy.py": "--train-images 8 --test-images 8 --epochs 1 --batch-size 4 --model cifar_resnet14 --width 4 "
    "--seeds 0 --recipes plain gkt --csv {tmp}/accuracy.csv --work {tmp}/accuracy_runs",
    "bench/accuracy_report.py": "--output {tmp}",
    "bench/overhead.py": "--model cifar_resnet20 --batch-size 2 --repeats 1 --csv {tmp}/overhead.csv",
    "bench/loss.py": "--shapes 0 --repeats 1 --output {tmp}/loss.csv",
    "bench/norm.py": "--shapes 2 --repeats 1 --csv {tmp}/norm.csv",
    "bench/trainer.py": "--batch-size 2 --steps 1 --repeats 1 --memory-steps 10 --csv {tmp}/trainer.csv",
    "examples/demo.py": "--epochs 1 --seeds 1 --train-images 50 --depth 14 --output {tmp}/demo",
    "examples/minimal.py": "",
    "examples/segmentation.py": "--train-images 4 --test-images 4 --batch-size 4 --epochs 1 "
    "--output {tmp}/segmentation",
}
"""The flags that make a command small; the last of two equal flags counts."""


def arguments_of(command: Command) -> list[str] | None:
    """What to execute instead of the command, as arguments of Python; None: it is right, and not for a test to run.

    Raises:
        ValueError: the command is of no known kind, or names something that doesn't exist.
    """
    words = list(command.words)
    where = f"line {command.line}: {command}"
    if words[0] in ("python", "python3") and words[1:3] == ["-m", "pip"]:
        words[:3] = ["pip"]
    if words[0] == "gkt-fast":
        words[:1] = ["python", "-m", "gkt_fast"]
    launcher = []
    if words[0] == "torchrun" and "-m" in words:
        launcher = ["-m", "torch.distributed.run", "--standalone", *words[1 : words.index("-m")]]
        words[: words.index("-m")] = ["python"]
    if words[0] in ("git", "cd", "source", ".") or words[:3] in (
        ["python", "-m", "venv"],
        ["python3", "-m", "venv"],
    ):
        return None
    if words[0] == "make":
        unknown = {word for word in words[1:] if "=" not in word} - make_targets()
        if unknown or len(words) == 1:
            raise ValueError(
                f"{where}: the Makefile has no target {', '.join(sorted(unknown)) or 'of that name'}"
            )
        return None
    if words[:2] == ["pip", "install"]:
        named = {
            extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")
        }
        if named - extras():
            raise ValueError(f"{where}: pyproject.toml has no extra {', '.join(sorted(named - extras()))}")
        return None
    if words[0] not in ("python", "python3"):
        raise ValueError(f"{where}: a command of no known kind")
    if "--pretrained" in words:  # its weights would be fetched
        return ["-c", f"from gkt_fast.cli import command_parser as p; p({words[3]!r}).parse({words[4:]!r})"]
    name, rest = (
        (" ".join(words[2:4]), words[4:]) if words[1:3] == ["-m", "gkt_fast"] else (words[1], words[2:])
    )
    if name not in SMALL:
        raise ValueError(f"{where}: SMALL in {Path(__file__).name} doesn't know how to run {name!r}")
    start = ["-m", *name.split()] if name.startswith("gkt_fast") else [str(ROOT / name)]
    return [*launcher, *start, *rest, *shlex.split(SMALL[name])]


def readers_data(arguments: list[str], folder: Path) -> list[str]:
    """Puts generated images in the place of a reader's own."""
    for i, argument in enumerate(arguments):
        if re.match(r"(--data=)?(imagefolder|cifar10):", argument):
            random = np.random.default_rng(0)
            for name in ("train/a", "train/b", "val/a", "val/b"):
                (folder / "data" / name).mkdir(parents=True)
                for image in range(4):
                    pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "data" / name / f"{image}.png")
            flag = argument[: argument.index("=") + 1] if argument.startswith("--data=") else ""
            return [*arguments[:i], f"{flag}imagefolder:{folder / 'data'}", *arguments[i + 1 :]]
    return arguments


def readers_runs(arguments: list[str], folder: Path) -> None:
    """Makes the runs that a reader has trained before `plot` draws them."""
    if arguments[:3] == ["-m", "gkt_fast", "plot"]:
        for run in arguments[3 : arguments.index("-o")]:
            (folder / run).mkdir(parents=True)
            (folder / run / "summary.csv").write_text(
                "epoch,train_loss,val_accuracy\n0,2.0,0.5\n1,1.0,0.75\n"
            )


def readers_checkpoint(arguments: list[str], folder: Path) -> None:
    """Trains what the command's checkpoint is to be, in the folder that the command names."""
    if "--initial-checkpoint" in arguments:
        train_small(folder / "runs" / "initial", arguments[arguments.index("--model") + 1])
        shutil.copy(
            folder / "runs" / "initial" / "last.pt",
            folder / arguments[arguments.index("--initial-checkpoint") + 1],
        )
    if arguments[:2] == ["-m", "gkt_fast"] and arguments[2] in ("subnets", "elastic"):
        train_small(folder / arguments[3])
    if arguments[:3] == ["-m", "gkt_fast", "predict"]:
        train_small(folder / "runs" / "small")
        run_gkt(
            "elastic", "runs/small", "-o", arguments[3], *SMALL["gkt_fast elastic"].split(), folder=folder
        )
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / arguments[4])


def train_small(run: Path, model: str = "cifar_resnet14") -> None:
    flags = ["--epochs", "1", "--train-images", "60", "-b", "20", "--device", "cpu", "--model", model]
    run_gkt("train", *flags, "--output", str(run.parent), "--experiment", run.name, folder=run.parents[1])


def run_gkt(*arguments: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "gkt_fast", *arguments], cwd=folder, check=True)


def execute_command(command: Command, folder: Path) -> str:
    """Runs a command, small; returns what it prints, "" where it is not for a test to run."""
    arguments = arguments_of(command)
    if arguments is None:
        return ""
    arguments = [argument.replace("{tmp}", str(folder)) for argument in readers_data(arguments, folder)]
    readers_runs(arguments, folder)
    readers_checkpoint(arguments, folder)
    environment = os.environ | dict(command.variables)
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"line {command.line}: {command}\n{result.stdout}{result.stderr}"
    return result.stdout


def execute_block(
    block: Block, page: str = "README.md", namespace: dict[str, object] | None = None
) -> dict[str, object]:
    """Executes a Python block; returns its namespace."""
    namespace = readers_names() if namespace is None else namespace
    exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), namespace)
    return namespace


def readers_names() -> dict[str, object]:
    """What readers of the first pages bring along."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))
    loaders = {"train_loader": DataLoader(data, 8, shuffle=True), "val_loader": DataLoader(data, 8)}
    return {"__name__": "__main__", **loaders}


def names_of_the_guide() -> dict[str, object]:
    """What the pages of the guide take for granted."""
    names = readers_names()
    model = cifar_resnet(20)
    names |= {
        "gkt_fast": gkt_fast,
        "GKT": GKT,
        "model": model,
        "config": GKTConfig(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "dataset": names["train_loader"].dataset,
        "test_loader": names["val_loader"],
        "images": torch.randn(4, 3, 32, 32),
    }
    return names


def broken_links(path: Path, text: str) -> list[str]:
    """Relative targets of links and images that don't exist, and anchors without a heading."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    prose = re.sub(r"`[^`\n]*`", "", prose)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r'(?:src|srcset|href)="([^"]+)"', prose)
    targets += re.findall(r"^\[[^\]]+\]: +(\S+)", prose, re.MULTILINE)
    broken = []
    for target in targets:
        file, _, anchor = target.partition("#")
        if re.match(r"(https?|mailto):", target):
            continue
        if (file and not (path.parent / file).exists()) or (not file and anchor not in anchors):
            broken.append(target)
    return broken


BLOCKS = [
    (page.relative_to(ROOT).as_posix(), block) for page in PAGES for block in fenced_blocks(page.read_text())
]
COMMANDS = {
    (command.words, command.variables): pytest.param(command, id=f"{page}:{command.line}: {command}")
    for page, block in reversed(BLOCKS)
    if block.language in SHELL
    for command in shell_commands(block)
}
"""Each once, where it stands first."""


@pytest.mark.parametrize(
    "page, block",
    [
        pytest.param(page, block, id=f"{page}:{block.line}")
        for page, block in BLOCKS
        if block.language in PYTHON and ROOT / page in FIRST_PAGES
    ],
)
def test_python_block(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute_block(block, page)


@pytest.mark.parametrize(
    "page",
    dict.fromkeys(
        page for page, block in BLOCKS if block.language in PYTHON and ROOT / page not in FIRST_PAGES
    ),
)
def test_python_blocks_of_the_guide(page, tmp_path, monkeypatch):
    """One after another, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # of this process
    namespace = names_of_the_guide()
    for where, block in BLOCKS:
        if where == page and block.language in PYTHON:
            execute_block(block, page, namespace)


@pytest.mark.parametrize("command", COMMANDS.values())
def test_command(command, tmp_path):
    execute_command(command, tmp_path)


def test_blocks_are_of_known_languages():
    """A misspelt language would take a block out of the tests."""
    assert {block.language for _, block in BLOCKS} <= {*PYTHON, *SHELL, *SHOWN}


def test_relative_links_lead_somewhere():
    """Also those in HTML, which test_docs.py doesn't see."""
    path = ROOT / "README.md"
    assert broken_links(path, path.read_text()) == []


SAMPLE = """# Sample

See [the licence](LICENSE), [gone](docs/gone.md), [below](#two-words), [nowhere](#three) and
[outside](https://example.org). <img src="gone.png">

## Two words!

```python
from gkt_fast import GKTConfig
config = GKTConfig(groups=2)
batch = next(iter(train_loader))
```

```sh
# a comment
$ git clone https://example.org/x.git && cd x   # and another
GKT_NATIVE=0 pip install ".[test,bench]"
make test VENV=env
python -m gkt_fast \\
    env
```

```text
not python
```
"""


def sample_command(text: str) -> Command:
    return shell_commands(Block("sh", f"{text}\n", 7))[0]


def test_blocks_and_commands_are_found():
    python, shell, shown = fenced_blocks(SAMPLE)
    assert [block.language for block in (python, shell, shown)] == ["python", "sh", "text"]
    assert SAMPLE.splitlines()[python.line - 1] == "from gkt_fast import GKTConfig"
    commands = [(str(command), dict(command.variables), command.line) for command in shell_commands(shell)]
    assert commands == [
        ("git clone https://example.org/x.git", {}, shell.line + 1),
        ("cd x", {}, shell.line + 1),
        ("pip install '.[test,bench]'", {"GKT_NATIVE": "0"}, shell.line + 2),
        ("make test VENV=env", {}, shell.line + 3),
        ("python -m gkt_fast env", {}, shell.line + 4),
    ]
    assert [arguments_of(command) for command in shell_commands(shell)] == [None] * 4 + [
        ["-m", "gkt_fast", "env"]
    ]
    with pytest.raises(ValueError, match="line 1: the code block is not closed"):
        fenced_blocks("```python\n")


def test_blocks_are_executed():
    block = fenced_blocks(SAMPLE)[0]
    namespace = execute_block(block)
    assert namespace["config"].groups == 2
    assert namespace["batch"][0].shape == (8, 3, 32, 32)
    with pytest.raises(NameError) as error:
        execute_block(Block("python", "x = 1\ny = undefined\n", 40))
    assert error.traceback[-1].lineno + 1 == 41
    with pytest.raises(NameError):
        execute_block(Block("python", "config", 1))  # of another block


@pytest.mark.parametrize(
    "text, message",
    [
        ("rm -rf x", "line 7: rm -rf x: a command of no known kind"),
        ("make tests", "the Makefile has no target tests"),
        ("make", "the Makefile has no target"),
        ("pip install .[all]", "pyproject.toml has no extra all"),
        ("python -m pip install -e '.[test,gpu]'", "pyproject.toml has no extra gpu"),
        ("python examples/gone.py", "SMALL in test_readme.py doesn't know how to run 'examples/gone.py'"),
        ("python -m gkt_fast eval", "doesn't know how to run 'gkt_fast eval'"),
    ],
)
def test_commands_that_name_what_is_not_there(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments_of(sample_command(text))


@pytest.mark.parametrize("name", [name for name in SMALL if name.endswith(".py")])
def test_scripts_have_the_flags_that_make_them_small(name):
    source = (ROOT / name).read_text()
    assert [flag for flag in re.findall(r"--[\w-]+", SMALL[name]) if f'"{flag}"' not in source] == []


def test_commands_are_executed_small_and_on_generated_images(tmp_path):
    command = sample_command(
        "gkt-fast train --data imagefolder:/data/mine --model cifar_resnet14 --epochs 300 --amp"
    )
    assert "(8 images)" in execute_command(command, tmp_path)
    assert (tmp_path / "runs" / "cifar_resnet14-gkt" / "last.pt").exists()
    with pytest.raises(AssertionError, match="unrecognized arguments: --fast"):
        execute_command(sample_command("python -m gkt_fast env --fast"), tmp_path)
    with pytest.raises(AssertionError, match="GKT_BACKEND"):
        execute_command(sample_command("GKT_BACKEND=abacus python examples/minimal.py"), tmp_path)


def test_broken_links_are_found():
    assert broken_links(ROOT / "README.md", SAMPLE) == ["docs/gone.md", "#three", "gone.png"]
