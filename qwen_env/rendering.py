"""An episode as text, for a terminal or a notebook."""

from unicodedata import category

from qwen_env.task import Outcome


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


def printable(text: str) -> str:
    """`text` with escapes for control characters, which a terminal would obey."""
    return "".join(
        # Category Zs: spaces of all kinds, such as the wide one of Chinese text.
        c if c.isprintable() or c == "\n" or category(c) == "Zs" else ascii(c)[1:-1]
        for c in text
    )
