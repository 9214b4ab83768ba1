"""Judges say no: an answer in, a verdict out, and if they can, the part of the answer that is wrong.

    judging    what an answer, a verdict and a judge are; a function as a judge
    rules      loops, length, refusal, regex, word list, language
    llm        a model at an endpoint, with a rubric
    person     somebody at the terminal, one key an answer
    naming     a judge's name on the command line -> the judge

A judge knows nothing of files, counts or rounds: `mine` makes records of verdicts.
"""

from buleyean_rl.mining.judges.llm import DEFAULT_RUBRIC, LlmJudge
from buleyean_rl.mining.judges.person import PersonJudge
from buleyean_rl.mining.judges.protocol import Answer, FunctionJudge, Judge, Verdict
from buleyean_rl.mining.judges.registry import find_judge

__all__ = [
    "DEFAULT_RUBRIC",
    "Answer",
    "FunctionJudge",
    "Judge",
    "LlmJudge",
    "PersonJudge",
    "Verdict",
    "find_judge",
]
