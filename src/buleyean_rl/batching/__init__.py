"""Records to what a model computes at once.

batch         records --pack or pad--> `Batch`
layout        the layout that a model takes, packed or padded --> which of the two
micro_batch   bin packing: records into micro-batches
forward       `Batch` --> hidden states, the reference's, losses
"""
