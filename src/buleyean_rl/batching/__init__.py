"""Records to micro-batches to losses.

batch         records --pack or pad--> `Batch`
layout        `make_batch`: packed or padded, by the model's layout
micro_batch   bin packing: records into micro-batches
forward       `Batch` --> hidden states, of the model and of the reference, and losses
"""
