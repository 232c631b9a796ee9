"""Runs the CUDA C++ kernels on the CPU and judges them; see README.md."""
