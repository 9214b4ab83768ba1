"""Measurements that need no judge and no download: every figure is computed from the model alone.

repetition    texts: loops, distinct 4-grams, overlap
neutral_text  plain texts under a model: nats per token
statistics    numbers: rankings, intervals, paired differences
scoring       a model or an engine -> log-probabilities of answers and texts
measure       a model's name and what is asked -> `Evaluation`
drift         a run -> what training did to neutral texts
show          evaluations -> a JSON object, a table, a plot
"""
