"""What torch does in too many sweeps, in C for a CPU.

    *.c --`build`, once--> a library --ctypes--> functions of tensors

All of it is for bf16. Products, the loss and attention go
block by block, in a processor's matrix registers (AMX) or in its vectors (`tiles.h`). Where there is no compiler
`available()` is False, and the callers do the same work in torch, in more sweeps. On CUDA the passes of the loss are in
`triton.py`.
"""
