"""Measurements that need no judge and no download: every figure is computed from the model alone.

repetition    texts: loops, distinct 4-grams, overlap
neutral_text  plain texts under a model: nats per token
statistics    numbers: rankings, intervals, paired differences
scoring       a model or an engine -> log-probabilities of answers and texts
drift         a model -> what training did to its base's own passages and to bundled texts
kept_answers  a run -> its base's answers that do not loop, and how many stay
measure       a model's name and what is asked -> `Evaluation`
show          evaluations -> a JSON object, a table, a plot
"""
