"""Data of `buleyean demo`: everyday prompts in two splits, and neutral prose to measure drift on.

Each file has one text per line. The prompt files have the same mix of topics, styles and lengths, without
near-duplicates between them.
"""

from importlib.resources import files

__all__ = ["held_out_prompts", "mine_prompts", "neutral_texts"]


def mine_prompts() -> list[str]:
    """Prompts to mine."""
    return _lines("mine_prompts.txt")


def held_out_prompts() -> list[str]:
    """Prompts to measure on, never mined."""
    return _lines("held_out_prompts.txt")


def neutral_texts() -> list[str]:
    """Short paragraphs on varied topics, to measure drift on."""
    return _lines("neutral.txt")


def _lines(name: str) -> list[str]:
    text = files(__name__).joinpath(name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
