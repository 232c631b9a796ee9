"""Imports run one way: the layers of the package, read from its source."""

from __future__ import annotations

import ast
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTERNAL = {
    "torch", "numpy", "yaml", "tqdm", "torchvision", "sklearn", "matplotlib", "triton", "timm", "onnx",
    "onnxruntime", "tensorboard", "wandb", "PIL",
}  # fmt: skip

ALLOWED = {
    "gkt_fast.config": [],
    "gkt_fast.subnet": [],
    "gkt_fast.sampling": ["gkt_fast.config", "gkt_fast.subnet"],
    "gkt_fast.methods": ["gkt_fast.config"],
    "gkt_fast.plan": ["gkt_fast.config", "gkt_fast.subnet"],
    "gkt_fast.budget": ["gkt_fast.config", "gkt_fast.subnet", "gkt_fast.sampling", "gkt_fast.plan"],
    "gkt_fast.ops*": ["gkt_fast.ops*", "gkt_fast.kernels*", "gkt_fast._native"],
    "gkt_fast.kernels*": ["gkt_fast.kernels*"],
    "gkt_fast.models*": ["gkt_fast.models*", "gkt_fast.subnet"],
    "gkt_fast.compilation": ["gkt_fast.models*", "gkt_fast.subnet"],
    "gkt_fast.losses": ["gkt_fast.ops*"],
    "gkt_fast.synchronized_norm": [],
    "gkt_fast.distributed": [],
    "gkt_fast.norm": ["gkt_fast.ops*", "gkt_fast.synchronized_norm"],
    "gkt_fast.fusion": ["gkt_fast.norm", "gkt_fast.ops*"],
    "gkt_fast.execution*": [
        "gkt_fast.execution*", "gkt_fast.plan", "gkt_fast.sampling", "gkt_fast.config", "gkt_fast.subnet",
        "gkt_fast.models*", "gkt_fast.ops*", "gkt_fast.losses", "gkt_fast.norm", "gkt_fast.distributed",
    ],
    "gkt_fast.flops": ["gkt_fast.execution*", "gkt_fast.plan"],
    "gkt_fast.extraction": [
        "gkt_fast.execution*", "gkt_fast.models*", "gkt_fast.subnet", "gkt_fast.fusion",
    ],
    "gkt_fast.export": ["gkt_fast.execution*", "gkt_fast.extraction", "gkt_fast.subnet", "gkt_fast.fusion"],
    "gkt_fast.subnet_table": [
        "gkt_fast.config", "gkt_fast.sampling", "gkt_fast.subnet", "gkt_fast.flops", "gkt_fast.extraction",
        "gkt_fast.evaluation",
    ],
    "gkt_fast.gkt": [
        "gkt_fast.execution*", "gkt_fast.plan", "gkt_fast.sampling", "gkt_fast.config", "gkt_fast.subnet",
        "gkt_fast.models*", "gkt_fast.flops", "gkt_fast.fusion", "gkt_fast.budget",
        "gkt_fast.compilation",
    ],
    "gkt_fast.environment": ["gkt_fast.ops*"],
    "gkt_fast.selfcheck*": [
        "gkt_fast.selfcheck*", "gkt_fast.environment", "gkt_fast.gkt", "gkt_fast.execution*", "gkt_fast.config",
        "gkt_fast.models*", "gkt_fast.ops*",
    ],
    "gkt_fast.survival": [
        "gkt_fast.execution*", "gkt_fast.sampling", "gkt_fast.subnet", "gkt_fast.models*",
    ],
    "gkt_fast.checkpoint": ["gkt_fast.config"],
    "gkt_fast.schedules": [],
    "gkt_fast.nonfinite": [],
    "gkt_fast.weight_average": [],
    "gkt_fast.callbacks": [],
    "gkt_fast.interruption": ["gkt_fast.distributed"],
    "gkt_fast.batches": ["gkt_fast.checkpoint", "gkt_fast.distributed"],
    "gkt_fast.optimization": ["gkt_fast.nonfinite", "gkt_fast.distributed"],
    "gkt_fast.fitting": [
        "gkt_fast.batches", "gkt_fast.callbacks", "gkt_fast.checkpoint", "gkt_fast.distributed", "gkt_fast.subnet",
        "gkt_fast.interruption", "gkt_fast.loggers", "gkt_fast.metrics", "gkt_fast.nonfinite",
    ],
    "gkt_fast.__init__": ["gkt_fast.*"],
    "gkt_fast.__main__": ["gkt_fast.cli*"],
    "gkt_fast.cli*": ["gkt_fast.*", "gkt_fast"],
}  # fmt: skip
"""What a module (or pattern) may import of the package; the first pattern that fits counts."""

ABOVE = ["gkt_fast.cli*", "gkt_fast.__main__"]
"""What no other module may import. Modules without a row (trainer, checkpoint, ...) may import the rest."""

TORCH_FREE = [
    "gkt_fast.config", "gkt_fast.methods", "gkt_fast.subnet", "gkt_fast.sampling", "gkt_fast.plan", "gkt_fast.budget",
]  # fmt: skip
ONLY_TORCH_AND_TRITON = "gkt_fast.kernels*"
BACKENDS = {"cpp", "triton"}
"""Names of backends that mean nothing else."""
KNOW_BACKENDS = ["gkt_fast.ops*", "gkt_fast.kernels*", "gkt_fast.cli*", "gkt_fast.environment"]


def modules() -> dict[str, Path]:
    """Every module of the package with its file; `package.__init__` for a package."""
    found = {}
    for top, folder in (("gkt_fast", ROOT / "gkt_fast"), ("gkt_fast.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            found[".".join([top, *path.relative_to(folder).with_suffix("").parts])] = path
    return found


MODULES = modules()


def fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def imports(name: str, path: Path) -> set[str]:
    """All modules that a file imports, wherever the statement stands but for type checkers; names made absolute."""
    found = set()
    package = name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            known = {target for target in submodules if target in MODULES or f"{target}.__init__" in MODULES}
            known |= {target for target in submodules if target == "gkt_fast._native"}
            found |= known
            if len(known) < len(submodules):
                found.add(module)
    return found


def test_the_walk_sees_imports():
    """A walk that finds nothing would pass every other test here."""
    for name, target in (
        ("gkt_fast.execution.shared", "gkt_fast.execution.states"),
        ("gkt_fast.ops.native", "gkt_fast._native"),
        ("gkt_fast.models.discovery", "torch.nn.functional"),
    ):
        assert target in imports(name, MODULES[name])


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    inner = {target for target in imports(name, MODULES[name]) if target.split(".")[0] == "gkt_fast"}
    for pattern, allowed in ALLOWED.items():
        if fnmatchcase(name, pattern):
            wrong = {target for target in inner if not fits(target, allowed)}
            break
    else:
        wrong = {target for target in inner if fits(target, ABOVE)}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


@pytest.mark.parametrize("name", MODULES)
def test_third_party_imports(name):
    outer = {target.split(".")[0] for target in imports(name, MODULES[name])} - {"gkt_fast"}
    outer -= sys.stdlib_module_names
    assert outer <= EXTERNAL, f"{name} imports {sorted(outer - EXTERNAL)}, no dependency of the project"
    if fits(name, TORCH_FREE):
        assert outer <= {"yaml"}
    if fnmatchcase(name, ONLY_TORCH_AND_TRITON):
        assert outer <= {"torch", "triton"}
    if not fits(name, KNOW_BACKENDS):
        assert "triton" not in outer


@pytest.mark.parametrize("name", [name for name in MODULES if not fits(name, KNOW_BACKENDS)])
def test_only_ops_knows_the_names_of_backends(name):
    tree = ast.parse(MODULES[name].read_text())
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not strings & BACKENDS, f"{name} names the backends {sorted(strings & BACKENDS)}"


def test_tests_and_benchmarks_are_not_imported():
    for name, path in MODULES.items():
        tops = {target.split(".")[0] for target in imports(name, path)}
        assert not tops & {"bench", "python_tests", "examples", "pytest"}, name


def test_every_package_is_installed():
    """setuptools takes the packages from a list; one that is missing there is missing from the wheel."""
    table = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    listed = re.findall(r'"(.*?)"', table.group(1))
    packages = {name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__")}
    assert set(listed) == packages
    folders = {name.rpartition(".")[0] for name in MODULES}
    assert folders == packages, "a folder of modules has no __init__.py"
