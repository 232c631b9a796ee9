"""Imports run one way: the layers of the package, read from its source."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTERNAL = {
    "torch", "numpy", "safetensors", "yaml", "tqdm", "torchvision", "sklearn", "matplotlib", "triton", "timm", "onnx",
    "accelerate", "lightning", "onnxruntime", "tensorboard", "transformers", "wandb", "PIL",
}  # fmt: skip

ROOMS = {
    "config": [],
    "distributed": [],
    "image_folder": [],
    "models": [],
    "pictures": [],
    "kernels": [],
    "subnets": ["config"],
    "ops": ["config", "kernels", "_native"],
    "network": ["subnets", "config"],
    "batch_norm": ["ops", "network"],
    "execution": ["network", "batch_norm", "ops", "subnets", "config", "distributed"],
    "gkt": ["execution", "network", "batch_norm", "subnets", "config", "ops"],
    "deployment": ["network", "batch_norm", "subnets", "config", "distributed", "pictures"],
    "training": ["deployment", "gkt", "execution", "network", "subnets", "config", "distributed"],
}
"""What a room (a folder, or a module of the root) may import of the others."""

FACES = ["data", "losses", "methods", "moved", "selfcheck"]
"""What users import, and no room but the entrances: these may import all but the entrances."""

ENTRANCES = ["__init__", "__main__", "cli", "instruments", "integrations"]
"""What nothing of the package imports."""

TORCH_FREE = ["config", "methods", "subnets"]
BACKENDS = {"cpp", "triton"}
"""Names of backends that mean nothing else."""
KNOW_BACKENDS = ["ops", "kernels", "cli", "selfcheck", "instruments"]


def modules() -> dict[str, Path]:
    """Every module of the package with its file; `package.__init__` for a package."""
    found = {}
    for top, folder in (("gkt_fast", ROOT / "gkt_fast"), ("gkt_fast.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            found[".".join([top, *path.relative_to(folder).with_suffix("").parts])] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """All modules that a file imports, wherever the statement stands, also for type checkers; names made absolute."""
    found = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
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


def room(name: str) -> str:
    """The room of a module of the package."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def inner_imports(name: str) -> set[str]:
    return {target for target in imports(name, MODULES[name]) if target.split(".")[0] == "gkt_fast"}


def test_the_walk_sees_imports():
    """A walk that finds nothing would pass every other test here."""
    for name, target in (
        ("gkt_fast.execution.shared", "gkt_fast.execution.states"),
        ("gkt_fast.ops.native", "gkt_fast._native"),
        ("gkt_fast.network.discovery", "torch.nn.functional"),
    ):
        assert target in imports(name, MODULES[name])


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    here = room(name)
    others = {room(target) for target in inner_imports(name)} - {here}
    if here in ROOMS:
        assert others <= set(ROOMS[here]), f"{here} must not import {sorted(others - set(ROOMS[here]))}"
    elif here not in ENTRANCES:
        assert not others & set(ENTRANCES), f"{here} must not import {sorted(others & set(ENTRANCES))}"


def test_rooms_without_a_row_are_known():
    assert {room(name) for name in MODULES} == {*ROOMS, *FACES, *ENTRANCES}


def test_no_imports_in_a_circle():
    """Of modules, those for type checkers included. A package's `__init__` only gathers names."""
    graph = {name: inner_imports(name) & MODULES.keys() for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", MODULES)
def test_third_party_imports(name):
    outer = {target.split(".")[0] for target in imports(name, MODULES[name])} - {"gkt_fast"}
    outer -= sys.stdlib_module_names
    assert outer <= EXTERNAL, f"{name} imports {sorted(outer - EXTERNAL)}, no dependency of the project"
    if room(name) in TORCH_FREE:
        assert outer <= {"yaml"}
    if room(name) == "kernels":
        assert outer <= {"torch", "triton"}
    if room(name) not in KNOW_BACKENDS:
        assert "triton" not in outer


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in KNOW_BACKENDS])
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
