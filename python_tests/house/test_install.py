"""Wheels and sdist: what is in them, the build's settings, and that they work outside the source tree."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

import gkt_fast

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
SETTINGS = (
    "GKT_NATIVE",
    "GKT_CUDA",
    "GKT_CUDA_ARCHS",
    "CMAKE_ARGS",
    "CUDACXX",
    "CUDA_PATH",
    "CUDAToolkit_ROOT",
)

STEP = """
import sys, torch, gkt_fast
from gkt_fast.models import cifar_resnet
torch.manual_seed(0)
model = cifar_resnet(14, num_classes=5, width=4)
trainer = gkt_fast.GKTTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
output = trainer.step(torch.randn(4, 3, 8, 8), torch.arange(4))
assert torch.isfinite(output.loss) and len(output.subnets) == 3
print(gkt_fast.__file__)
"""


ENVIRONMENT = "from gkt_fast.cli import main; sys.exit(main(['env']))"


@pytest.fixture(scope="module")
def build_tools() -> None:
    """The tests build without isolation, so without a network."""
    if MISSING:
        reason = f"{', '.join(MISSING)} not installed (extra 'test')"
        if "cpp" in os.environ.get("GKT_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree without anything that was built in it."""
    target = tmp_path_factory.mktemp("source") / "gkt_fast"
    target.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".so":
            shutil.copy2(path, target)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("bench", "csrc", "examples", "gkt_fast", "kernels", "python_tests"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    (target / "kernels" / "cuda").mkdir(exist_ok=True)
    (target / "kernels" / "cuda" / "packaged.cuh").write_text("// a header\n")
    return target


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build("sdist", tree, folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The source tree as the sdist has it: wheels are built from this one."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def native_build(unpacked, build_tools, tmp_path_factory) -> tuple[Path, str]:
    """The wheel of a build where there is no nvcc, and what the build printed. Not optimised: four times faster."""
    folder = tmp_path_factory.mktemp("native")
    path = path_without_nvcc(tmp_path_factory.mktemp("bin"))
    log = build("wheel", unpacked, folder, PATH=path, CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug")
    return next(folder.glob("*.whl")), log


@pytest.fixture(scope="module")
def pure_wheel(unpacked, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    build("wheel", unpacked, folder, GKT_NATIVE="0")
    return next(folder.glob("*.whl"))


def build(kind: str, source: Path, output: Path, *, fails: bool = False, **settings: str) -> str:
    """Calls the build backend as pip does, without isolation; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    scripts = [str(Path(sys.executable).parent), *tool_folders()]
    environment["PATH"] = os.pathsep.join([*scripts, os.environ["PATH"]])
    command = [
        sys.executable,
        "-c",
        f"from setuptools import build_meta as b; b.build_{kind}({str(output)!r})",
    ]
    result = subprocess.run(
        command,
        cwd=source,
        env=environment | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


@functools.cache
def tool_folders() -> tuple[str, ...]:
    """Where pip put the commands of cmake and ninja, when the environment is not activated."""
    folders = []
    for name in ("cmake", "ninja"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            packages = Path(spec.origin).parents[1]
            folders += [str(packages.parents[2] / "bin"), str(Path(spec.origin).parent / "data" / "bin")]
    return tuple(folder for folder in dict.fromkeys(folders) if Path(folder).is_dir())


def cmake() -> str:
    program = shutil.which("cmake", path=os.pathsep.join([*tool_folders(), os.environ["PATH"]]))
    assert program is not None
    return program


def path_without_nvcc(folder: Path) -> str:
    """The search path; a folder that has nvcc is replaced by links to everything else in it."""
    folders = []
    for i, entry in enumerate([str(Path(sys.executable).parent), *tool_folders(), *os.get_exec_path()]):
        if not Path(entry, "nvcc").exists():
            folders.append(entry)
            continue
        links = folder / str(i)
        links.mkdir()
        for tool in Path(entry).iterdir():
            if not tool.name.startswith("nvcc"):
                (links / tool.name).symlink_to(tool)
        folders.append(str(links))
    return os.pathsep.join(folders)


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages (torch is large) but not this one's gkt_fast."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    seen = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    Path(packages, "outer.pth").write_text("\n".join(seen) + "\n")
    return python


def install(python: Path, *arguments: str, **settings: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", *arguments]
    result = subprocess.run(
        command, env=environment | settings, capture_output=True, text=True, check=False, cwd=python.parent
    )
    assert result.returncode == 0, result.stdout + result.stderr


def run(python: Path | str, *arguments: str) -> str:
    """What the command prints, run outside the source tree."""
    result = subprocess.run(
        [str(python), *arguments], cwd=Path(python).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "torch/utils/flop_counter.py" not in line]
    assert not warnings  # torch's own, on an import where there is no Triton
    return result.stdout


def installed_files(tree: Path) -> set[str]:
    """What a wheel must hold of the source tree."""
    package = {path.relative_to(tree) for path in (tree / "gkt_fast").rglob("*.py")}
    kernels = {
        Path("gkt_fast", path.relative_to(tree))
        for pattern in ("*.py", "*.cu", "*.cuh")
        for path in (tree / "kernels").rglob(pattern)
    }
    return {path.as_posix() for path in package | kernels} | {"gkt_fast/py.typed"}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def without_metadata(files: Iterable[str]) -> set[str]:
    return {name for name in files if ".dist-info/" not in name}


def test_sdist_holds_what_a_build_needs(sdist, tree):
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    needed = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    needed |= {
        name.removeprefix("gkt_fast/") if "/kernels/" in name else name for name in installed_files(tree)
    }
    needed |= {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"}
    needed |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert not needed - files


def test_native_wheel_is_complete(native_build, tree):
    wheel, _ = native_build
    files = names(wheel)
    modules = {name for name in files if re.fullmatch(r"gkt_fast/_native\..*(so|pyd)", name)}
    assert len(modules) == 1
    assert without_metadata(files) - modules == installed_files(tree)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)
    assert "none-any" not in wheel.name


def test_pure_wheel_is_complete(pure_wheel, tree):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert without_metadata(names(pure_wheel)) == installed_files(tree)


def test_metadata(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        metadata = archive.read(f"gkt_fast-{gkt_fast.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {gkt_fast.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"\n## [{gkt_fast.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert [re.split(r"[ >=]+", line)[1] for line in required] == ["torch", "numpy", "pyyaml", "tqdm"]


def test_a_build_without_nvcc_says_so_in_one_line(native_build):
    lines = [line for line in native_build[1].splitlines() if "CUDA kernels" in line]
    assert len(lines) == 1
    assert "gkt_fast: CUDA kernels off (nvcc not found)" in lines[0]


NVCC_VERSION = """#!/bin/sh
cat <<END
nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Cuda compilation tools, release {0}, V{0}.88
Build cuda_{0}.r{0}/compiler.1_0
END
"""


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ("11.4", "80"),
        ("11.8", "80-real;90"),
        ("12.1", "80-real;90"),
        ("12.4", "80-real;90"),
        ("12.6", "80-real;90"),
        ("12.8", "80-real;90-real;100-real;120"),
        ("13.0", "80-real;90-real;100-real;120"),
    ],
)
def test_architectures_are_those_that_nvcc_knows(version, architectures, build_tools, tmp_path):
    """Machine code for each, and PTX of the newest. By stand-ins that report a version and compile nothing."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC_VERSION.format(version))
    nvcc.chmod(0o755)
    script = tmp_path / "architectures.cmake"
    script.write_text(
        f"""
cmake_minimum_required(VERSION 3.24)
include("{(ROOT / "kernels" / "cuda" / "architectures.cmake").as_posix()}")
gkt_nvcc_version("{nvcc.as_posix()}" version)
gkt_cuda_architectures("${{version}}" architectures)
gkt_nvcc_jobs(jobs)
message(STATUS "${{version}} ${{architectures}} ${{jobs}}")
"""
    )
    printed = run(cmake(), "-P", str(script)).split()
    assert printed[1:3] == [version, architectures]
    assert int(printed[3]) >= 1


def test_a_second_build_in_one_tree_keeps_the_kernels(native_build, unpacked, tmp_path):
    """The second has another ninja, as pip's build environments have, and the first one's is gone."""
    (cache,) = unpacked.glob("build/native-*/CMakeCache.txt")
    first = next(line for line in cache.read_text().splitlines() if line.startswith("CMAKE_MAKE_PROGRAM:"))
    cache.write_text(cache.read_text().replace(first, "CMAKE_MAKE_PROGRAM:FILEPATH=/nonexistent/ninja"))
    path = path_without_nvcc(tmp_path)
    log = build("wheel", unpacked, tmp_path, PATH=path, CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug")
    assert "Building CXX object CMakeFiles/ghost_batch_norm" in native_build[1]
    assert "Building CXX object CMakeFiles/ghost_batch_norm" not in log
    assert "Building CXX object CMakeFiles/group_knowledge_loss" not in log


def test_a_build_that_could_not_be_configured_leaves_nothing_behind(unpacked, build_tools, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(unpacked, tree, ignore=shutil.ignore_patterns("build", "*.so"))
    log = build("wheel", tree, tmp_path, fails=True, CXX="/nonexistent/g++", GKT_CUDA="0")
    assert "/nonexistent/g++" in log
    assert not list(tree.rglob("CMakeCache.txt"))


def test_cuda_that_is_asked_for_and_not_there_fails(unpacked, build_tools, tmp_path):
    log = build("wheel", unpacked, tmp_path, fails=True, GKT_CUDA="1", PATH=path_without_nvcc(tmp_path))
    assert "gkt_fast: GKT_CUDA=1 but nvcc was not found" in log
    assert "the native module could not be built (see above); GKT_NATIVE=0 installs without it" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("GKT_NATIVE", "yes", "gkt_fast: GKT_NATIVE is 'yes'; it must be 0 or 1"),
        ("GKT_NATIVE", "", "gkt_fast: GKT_NATIVE is ''; it must be 0 or 1"),
        ("GKT_CUDA", "on", "gkt_fast: GKT_CUDA is 'on'; it must be auto, 0 or 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(unpacked, tmp_path, name, value, message):
    log = build("wheel", unpacked, tmp_path, fails=True, **{name: value})
    assert message in log
    assert "Traceback" not in log


def test_a_build_without_cmake_says_what_to_do(unpacked, build_tools, tmp_path):
    log = build("wheel", unpacked, tmp_path, fails=True, PATH=str(tmp_path))
    assert "gkt_fast: cmake was not found; GKT_NATIVE=0 installs without the native module" in log


def test_native_wheel_works_outside_the_source_tree(native_build, tmp_path):
    python = fresh_environment(tmp_path / "env")
    install(python, str(native_build[0]))
    package, environment = run(python, "-c", STEP + ENVIRONMENT).split("\n", 1)
    assert package.startswith(str(tmp_path / "env"))
    assert re.search(r"^native +cuda: none$", environment, re.MULTILINE)
    assert re.search(r"^native +compiler: ", environment, re.MULTILINE)
    assert run(python.parent / "gkt-fast", "env") == environment


def test_pure_wheel_works_and_says_why_there_is_no_native_backend(pure_wheel, tmp_path):
    python = fresh_environment(tmp_path / "env")
    install(python, str(pure_wheel))
    package, environment = run(python, "-c", STEP + ENVIRONMENT).split("\n", 1)
    assert package.startswith(str(tmp_path / "env"))
    reason = "the native module is not installed"
    assert re.search(rf"^native .*{reason}", environment, re.MULTILINE)
    rows = [line for line in environment.splitlines() if len(line.split()) > 1 and line.split()[1] == "cpp"]
    assert all(reason in row for row in rows)


def test_editable_install_maps_the_kernels(tree, tmp_path):
    python = fresh_environment(tmp_path / "env")
    install(python, "--editable", str(tree), GKT_NATIVE="0")
    code = "import gkt_fast, gkt_fast.kernels.triton as t; print(gkt_fast.__file__, t.__file__, sep='\\n')"
    package, kernels = run(python, "-c", code).splitlines()
    assert Path(package).samefile(tree / "gkt_fast" / "__init__.py")
    assert Path(kernels).samefile(tree / "kernels" / "triton" / "__init__.py")


OPTIONAL = ["triton", "torchvision", "sklearn", "matplotlib", "timm", "PIL", "tensorboard", "wandb", "onnx"]


@pytest.mark.parametrize("blocked", [["gkt_fast._native"], OPTIONAL], ids=["native", "optional"])
def test_import_and_a_step_without_what_is_optional(blocked):
    """Only torch, numpy, pyyaml and tqdm are required."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"  # None: importing it fails
    output = run(sys.executable, "-c", f"{block}\n{STEP}\n{ENVIRONMENT}")
    missing = "gkt_fast._native" in blocked or importlib.util.find_spec("gkt_fast._native") is None
    assert ("the native module is not installed" in output) == missing


TELL = """
import os, pathlib, runpy, setuptools, sys
setuptools.setup = lambda **options: None
for stream in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
namespace = runpy.run_path(sys.argv[1])
command = [sys.executable, "-c", "print('-- gkt_fast: compiling CUDA kernels for 80, 90'); print('-- other')"]
namespace["run"](command, pathlib.Path.cwd())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="has no pty")
def test_whoever_waits_for_nvcc_is_told_although_pip_hides_a_builds_output():
    import pty

    command = [sys.executable, "-c", TELL, str(ROOT / "setup.py")]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    told = b""
    while True:
        try:
            told += os.read(terminal, 1000)
        except OSError:  # the child has gone, and its terminal with it
            break
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert told.split(b"\r\n") == [b"", b"  gkt_fast: compiling CUDA kernels for 80, 90", b""]
    # Without a terminal nothing is said and nothing fails.
    subprocess.run(command, check=True, start_new_session=True)
