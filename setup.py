"""Builds the native module with CMake. Project metadata is in pyproject.toml.

GKT_NATIVE=0    install pure Python
GKT_CUDA=auto   build the CUDA kernels when nvcc is found (default); 1: fail without nvcc; 0: never
GKT_CUDA_ARCHS  semicolon-separated CMake architectures, default "80;90;100"
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
            f"-DGKT_CUDA={os.environ.get('GKT_CUDA', 'auto')}",
        ]
        if "GKT_CUDA_ARCHS" in os.environ:
            configure.append(f"-DGKT_CUDA_ARCHS={os.environ['GKT_CUDA_ARCHS']}")
        subprocess.run(configure, cwd=build_dir, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build_dir, check=True)


native = os.environ.get("GKT_NATIVE", "1")
if native not in ("0", "1"):
    sys.exit(f"GKT_NATIVE must be 0 or 1, not {native!r}")

setup(
    ext_modules=[CMakeExtension("gkt_fast._native")] if native == "1" else [],
    cmdclass={"build_ext": CMakeBuild},
)
