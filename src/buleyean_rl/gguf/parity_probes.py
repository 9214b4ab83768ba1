"""Texts and chats that the parity gate compares a file and its model on."""

from __future__ import annotations

TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say we've seen it.",
    "  two spaces,   three,\ttab,\t\ttwo tabs \n\n\nthree newlines\r\nand a carriage return  ",
    " ",
    "\n",
    "        eight spaces before, one after ",
    "0 1 12 123 1234 12345 3.14159 1,000,000 2024-02-29 0x1F ½ ² ٣ 四",
    "def f(x: int) -> int:\n    if x != 0 and not (x <= -1):\n\treturn x ** 2  # done\n\n\nprint(f'{f(3)!r}')",
    "naïve café Straße œuvre Ångström İstanbul ﬁ",
    "combining: e\u0301 n\u0303 a\u0308\u0323 o\u0335",
    "漢字とかな 中文字符 한국어 ภาษาไทย हिन्दी",
    "שלום עולם مرحبا بالعالم \u202eright to left\u202c",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ❤️ 🫠",
    "zero\u200bwidth\u200djoin\ufeffbom nb\u00a0space thin\u2009space em\u2014dash \u201cquotes\u201d \u2026",
    '<div class="a">&amp;</div> [INST] </s> <s> <unk> <|x|> <|im_start <0x0A> \\n \\u0041',
    "a\u0000b\u0007c\u001b[0m",
    "𝒻𝓊𝓃 𐍈 𓀀 \U0010fffd",
    "antidisestablishmentarianism" + "a" * 70 + "!?!?...,,,;;;:::---___***",
)
CHATS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello!"},),
    (
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "2 + 2 is 4."},
        {"role": "user", "content": "And if we\nadd <one> \"more\" & 'one'?"},
    ),
    (
        {"role": "system", "content": "You are a pirate. Answer briefly."},
        {"role": "user", "content": "Qu'est-ce que c'est? 漢字 🙂"},
    ),
)
