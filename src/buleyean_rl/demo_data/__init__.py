"""What `buleyean demo` runs on: everyday prompts in two splits, and neutral prose to measure drift on.

Each file holds one text per line. The two prompt files have the same mix of topics, styles and lengths, and
share no near-duplicates.
"""

from importlib.resources import files

__all__ = ["held_out_prompts", "mine_prompts", "neutral_texts"]


def mine_prompts() -> list[str]:
    """Return the prompts whose answers are mined for rejections."""
    return _lines("mine_prompts.txt")


def held_out_prompts() -> list[str]:
    """Return the prompts that only measure: no rejection is ever made from them."""
    return _lines("held_out_prompts.txt")


def neutral_texts() -> list[str]:
    """Return short prose paragraphs on varied topics, to measure nats per token before and after training."""
    return _lines("neutral.txt")


def _lines(name: str) -> list[str]:
    text = files(__name__).joinpath(name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
