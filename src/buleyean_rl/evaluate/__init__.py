"""Measurements that need no judge and no download.

    loops        texts: repeats, distinct 4-grams, overlap
    losses       boundaries: likelihoods and the objective, as training reports them
    statistics   numbers: rankings, intervals, paired differences
    scoring      a model or an engine -> log-probabilities of answers and texts
    measure      a model's name and what is asked -> `Evaluation`
    show         evaluations -> a JSON object, a table, a plot

The last three are not imported here: a rule that finds loops needs no model.

Every figure is computed from the model alone: no other model gives an opinion on an answer.
"""

from buleyean_rl.evaluate.loops import (
    distinct,
    is_looping,
    loop_rate,
    overlap,
    prefix_match,
    repeated_spans,
    repetition,
)
from buleyean_rl.evaluate.losses import HeldOut, mean_nll, neutral_boundary

__all__ = [
    "HeldOut",
    "distinct",
    "is_looping",
    "loop_rate",
    "mean_nll",
    "neutral_boundary",
    "overlap",
    "prefix_match",
    "repeated_spans",
    "repetition",
]
