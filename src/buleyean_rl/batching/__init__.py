"""Records to what a model computes at once.

layout    which layout a model takes: packed, or padded
rows      bin packing: records into micro-batches
batch     records --pack or pad--> `Batch`
forward   `Batch` --> hidden states, the reference's, losses
"""
