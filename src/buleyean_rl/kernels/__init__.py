"""What torch does in too many sweeps, in C for a CPU.

    *.c --`build`, once--> a library a type --ctypes--> functions of tensors

The element-wise passes of `kernels.c` are for bf16 and fp32; products, the loss and attention are for bf16. They go
block by block, in a processor's matrix registers (AMX) or in its vectors (`tiles.h`). Where there is no compiler
`available()` is False, and the callers do the same work in torch, in more sweeps. On CUDA the passes of the loss are in
`triton.py`.
"""
