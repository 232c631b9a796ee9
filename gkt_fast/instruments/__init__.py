"""What the package is measured with, and what it is measured against: for `bench/` and the tests alike.

Nothing else of the package imports these modules. Each needs its own extra (`bench` or `test`), or tools of CUDA.
"""
