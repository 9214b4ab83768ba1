"""The losses: from rejection counts and a model's hidden states to a number and its gradient.

complement           counts --> the complement distribution, and the irreducible loss of `published`
losses               every objective, dense: short and slow, the reference for `fused`
fused                the same without a (nodes, vocabulary) tensor
vocabulary_softmax   softmaxes over the vocabulary, tile by tile
likelihood           log-probabilities, KL and entropy of two models, nothing differentiated
"""
