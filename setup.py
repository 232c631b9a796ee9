"""Builds the native module with CMake. Project metadata is in pyproject.toml.

GKT_NATIVE=0    install pure Python
GKT_CUDA=auto   build the CUDA kernels when nvcc is found (default); 1: fail without nvcc; 0: never
GKT_CUDA_ARCHS  CMake architectures, semicolons between; default: what nvcc knows (kernels/cuda/architectures.cmake)
CMAKE_ARGS      further arguments for CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def setting(name: str, default: str, choices: tuple[str, ...]) -> str:
    """A choice from the environment; ends the build with a message when it is none of the choices."""
    value = os.environ.get(name, default)
    if value not in choices:
        sys.exit(f"gkt_fast: {name} is {value!r}; it must be {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def run(command: list[str], folder: Path) -> None:
    """Runs CMake; its own output says what went wrong. The terminal is told that CUDA kernels are compiled."""
    try:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, errors="replace")
    except FileNotFoundError:
        sys.exit(f"gkt_fast: {command[0]} was not found; GKT_NATIVE=0 installs without the native module")
    for line in process.stdout:
        print(line, end="", flush=True)
        if "gkt_fast: compiling CUDA kernels" in line:
            tell_terminal(line.removeprefix("-- ").strip())
    if process.wait() != 0:
        sys.exit(
            "gkt_fast: the native module could not be built (see above); GKT_NATIVE=0 installs without it"
        )


def tell_terminal(line: str) -> None:
    """Writes past pip, which hides a build's output unless -v is given, to whoever waits for what takes minutes."""
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n  {line}\n")
    except OSError:
        pass  # no terminal: nobody waits at it, and the build's output has the line


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = build_folder()
        configure = [
            "cmake",
            str(ROOT),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # pip's build environments are gone after each build, and with them what CMake remembers.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGKT_CUDA={cuda}",
            f"-DGKT_CUDA_ARCHS={os.environ.get('GKT_CUDA_ARCHS', '')}",
        ]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            run(configure, build_dir)
        except SystemExit:
            (build_dir / "CMakeCache.txt").unlink(missing_ok=True)  # it remembers compilers that aren't there
            raise
        run(["cmake", "--build", "."], build_dir)


def build_folder() -> Path:
    """Where objects stay from one build to the next, an editable one too: one folder per Python and platform."""
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    cache = folder / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n" not in cache.read_text():
        shutil.rmtree(folder)  # the source tree has been moved or copied
    folder.mkdir(parents=True, exist_ok=True)
    return folder


native = setting("GKT_NATIVE", "1", ("0", "1"))
cuda = setting("GKT_CUDA", "auto", ("auto", "0", "1"))

setup(
    ext_modules=[CMakeExtension("gkt_fast._native")] if native == "1" else [],
    cmdclass={"build_ext": CMakeBuild},
)
