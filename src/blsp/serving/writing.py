"""The tokens of one answer -> pieces of text, cut at stop strings.

In:  tokens, one at a time. Out: text that is certain to belong to the answer.
Try: `text = Answer(tokenizer, ("END",)); text.push(token)`
Flow: serving/ — scheduler.py's events -> **writing** -> app.py's chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from blsp.inference.text_stream import TextStream


class Answer:
    """Text of one answer as it grows; `stopped` once a stop string was met, which is not part of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._release(self._stream.push(token), final=False)

    def close(self) -> str:
        return self._release(self._stream.close(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        """What of the held text and `piece` cannot become part of a stop string any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
