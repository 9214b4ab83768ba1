"""What takes torch too many sweeps or, on a CPU without bf16, too long: C kernels for a CPU, Triton's for CUDA.

    c/*.c --`build`, once--> a library --`abi`, ctypes--> functions of tensors in bf16

`build.status()` says whether they compute here, and why not where they do not: then `abi.available()` is False, and the
callers do the same work in torch. Matrix products have a micro-kernel for AMX, AVX512-BF16, AVX512F and AVX2
(`c/gemm.h`). On CUDA only the passes of the loss are ours (`triton.py`).
"""
