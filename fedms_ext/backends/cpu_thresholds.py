"""Up to which rank the kernels of the CPU backend run. Written by `python -m bench.tools.cpu_ranks --write`, which measures it.

A file of the project and not a measurement at the start of a process, because kernels and eager backend round otherwise:
two processes of one run that measured differently would not compute the same bits. The rules of `avx512` and `portable` are
older and coarser: one rank for all rows, from the same comparison on a Xeon (AVX-512).
"""

# By instruction set: (rows from which on it holds, largest mean rank in a forward pass, in a backward pass), ascending.
LARGEST_RANK = {
    "avx2": ((1, 8, 48), (16, 32, 128), (64, 16, 128), (256, 32, 128), (1576, 8, 64)),
    "avx512": ((1, 48, 48),),
    "portable": ((1, 48, 48),),
}
