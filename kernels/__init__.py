"""Device code of gkt_fast: Triton kernels (`triton/`) and CUDA sources (`cuda/`)."""
