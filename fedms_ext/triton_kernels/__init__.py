"""The GPU kernels in Triton: `gemm.py` (the frozen GEMM with the ranks in it), `ranks.py` (the narrow parts),
`dropout.py` (the mask), `tiles.py` (tile shapes and their order), `launch.py` (tensors in, launches out).
"""
