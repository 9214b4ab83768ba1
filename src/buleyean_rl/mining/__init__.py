"""Make rejections: a model answers, judges say no, what was rejected becomes records.

judges/        an answer --> a verdict
mine           prompts --> answers --> verdicts --> records
draws          prompts --> answers that the journal lacks
journal        answers and verdicts on disk as they fall
votes          several judges' verdicts --> counts
answer_cache   greedy answers, cached on disk
walk           mine, train, measure; and again with the trained model
walk_engines   who answers in a walk
walk_report    a walk's table and plot
"""
