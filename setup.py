"""Builds the native module with CMake. Project metadata is in pyproject.toml.

GKT_NATIVE=0    install pure Python
GKT_CUDA=auto   build the CUDA kernels when nvcc is found (default); 1: fail without nvcc; 0: never
GKT_CUDA_ARCHS  semicolon-separated CMake architectures, default "80;90;100"
CMAKE_ARGS      further arguments for CMake
"""

import os
import shlex
import subprocess
import sys
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
    """Runs CMake; its own output says what went wrong."""
    try:
        subprocess.run(command, cwd=folder, check=True)
    except FileNotFoundError:
        sys.exit(f"gkt_fast: {command[0]} was not found; GKT_NATIVE=0 installs without the native module")
    except subprocess.CalledProcessError:
        sys.exit(
            "gkt_fast: the native module could not be built (see above); GKT_NATIVE=0 installs without it"
        )


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(ROOT),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGKT_CUDA={cuda}",
        ]
        if "GKT_CUDA_ARCHS" in os.environ:
            configure.append(f"-DGKT_CUDA_ARCHS={os.environ['GKT_CUDA_ARCHS']}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run(configure, build_dir)
        run(["cmake", "--build", "."], build_dir)


native = setting("GKT_NATIVE", "1", ("0", "1"))
cuda = setting("GKT_CUDA", "auto", ("auto", "0", "1"))

setup(
    ext_modules=[CMakeExtension("gkt_fast._native")] if native == "1" else [],
    cmdclass={"build_ext": CMakeBuild},
)
