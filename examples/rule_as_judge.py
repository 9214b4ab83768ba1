"""A rule as a judge: it rejects an answer, or only the part of it that breaks the rule.

python rule_as_judge.py                                                         from Python
buleyean mine prompts.txt --judge python:rule_as_judge:fits_a_headline ...      or from the command
"""

from buleyean_rl import mine

LIMIT = 80  # characters
PROMPTS = ["Write a headline about a lost dog.", "Write a headline about the first snow.", "Describe the sea."]


def fits_a_headline(prompt, answer):
    """The part that is too long, as [start, end) characters; none accepts. True or False would judge the whole."""
    return [(LIMIT, len(answer))] if len(answer) > LIMIT else []


if __name__ == "__main__":
    print(mine(PROMPTS, "smollm2-135m", "too-long.jsonl", judges=fits_a_headline, max_tokens=64))
