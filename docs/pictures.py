"""Draw every state of the Void's page, light and dark, at three widths, into a folder to look at.

python docs/pictures.py FOLDER [NAME...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browsers import browsing  # noqa: E402
from scenes import STATES, enter  # noqa: E402
from stage import staged  # noqa: E402

SIZES = {1280: 800, 900: 1000, 390: 844}
THEMES = ("light", "dark")


def draw(folder: Path, names: list[str]) -> None:
    """Every state, or those named, as NAME-WIDTH-THEME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, staged() as stage, browsing(Path(scratch)) as browser:
        browser.patience = 20
        for width, height in SIZES.items():
            browser.resize(width, height)
            for theme in THEMES:
                browser.prefer(theme)
                for name in names:
                    enter(browser, stage, STATES[name])
                    browser.driver.save_screenshot(str(folder / f"{name}-{width}-{theme}.png"))
        assert not (complaints := browser.complaints()), complaints


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2:] or list(STATES))
