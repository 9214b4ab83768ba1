"""Judges reject: an answer in, a verdict out, and if they can, the part of the answer that is wrong.

    protocol   what an answer, a verdict and a judge are; a function as a judge
    rules      loops, length, refusal, regex, word list, language
    llm        a model at an endpoint, with a rubric
    person     a person at the terminal, one key an answer
    registry   a judge's name on the command line -> the judge

A judge knows nothing of files, counts or rounds: `mine` makes records of verdicts.
"""

from buleyean_rl.mining.judges.protocol import OUTCOMES, Answer, Judge, Verdict
from buleyean_rl.mining.judges.registry import find_judge

__all__ = ["OUTCOMES", "Answer", "Judge", "Verdict", "find_judge"]
