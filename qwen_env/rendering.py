"""An episode as text, for a terminal or a notebook, and as a picture of one, for a video."""

from pathlib import Path

import numpy as np

from qwen_env.episodes import Outcome
from qwen_env.printing import printable


def render_episode(prompt: str, completion: str, outcome: Outcome | None) -> str:
    """The episode so far: `prompt|completion`, and a last line once it has an outcome."""
    if outcome is None:
        # An incomplete character decodes to a replacement character: wait for the rest of it.
        return printable(f"{prompt}|{completion}".rstrip("\ufffd"))
    reason, length = outcome.info["finish_reason"], outcome.info["completion_length"]
    ending = f"[{reason} after {length} tokens, reward {outcome.reward:+.3f}]"
    return printable(f"{prompt}|{completion}\n{ending}\n")


class LiveText:
    """Prints a growing text: each time, only what is new."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, text: str) -> None:
        """Print what `text` adds to the last one, or all of it if it is a new text."""
        if not text.startswith(self._shown):
            self.finish()
        print(text[len(self._shown) :], end="", flush=True)
        self._shown = text

    def finish(self) -> None:
        """End the line, so that the next text begins on one of its own."""
        if self._shown and not self._shown.endswith("\n"):
            print(flush=True)
        self._shown = ""


_COLUMNS, _ROWS = 80, 24
_COLUMN_WIDTH, _ROW_HEIGHT = 10, 20  # pixels


def picture(text: str) -> np.ndarray:
    """`text` as a terminal of 80 columns and 24 rows shows it: uint8 [480, 800, 3].

    Characters that the DejaVu font lacks, those of Chinese for instance, appear as boxes.
    """
    import matplotlib  # for its font, which has one width and more than Latin letters
    from PIL import Image, ImageDraw, ImageFont

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    font = ImageFont.truetype(file, size=_ROW_HEIGHT - 4)
    rows = [
        line[start : start + _COLUMNS]
        for line in text.split("\n")
        for start in range(0, max(len(line), 1), _COLUMNS)
    ]
    image = Image.new("RGB", (_COLUMNS * _COLUMN_WIDTH, _ROWS * _ROW_HEIGHT), "white")
    canvas = ImageDraw.Draw(image)
    for i, row in enumerate(rows[-_ROWS:]):
        canvas.text((0, i * _ROW_HEIGHT), row, fill="black", font=font)
    return np.array(image)
