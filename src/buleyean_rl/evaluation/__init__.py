"""Measurements that need no judge and no download: every figure is computed from the model alone.

repetition    texts: loops, distinct 4-grams, overlap
neutral_text  plain texts under a model: nats per token
statistics    numbers: rankings, intervals, paired differences
scoring       a model or an engine -> log-probabilities of answers and texts
drift         a model -> what training did to its base's own passages and to bundled texts
kept_answers  a run -> its base's answers that do not loop, and how many stay
measure       a model's name and what is asked -> `Evaluation`
labels        what figures are called, in which unit, which way is better
differences   two evaluations -> how they differ, and a verdict
show          evaluations -> a JSON object, lines of text
forest_plot   evaluations -> a picture
"""
