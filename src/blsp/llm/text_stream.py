"""Text of an answer while its tokens arrive.

In:  the tokens of one answer, one at a time.
Out: pieces of text; together they are the decoded answer without the white space around it.
Try: `stream = TextStream(tokenizer); print(stream.push(token)); print(stream.close())`
Flow: decoding.py (tokens) → **text_stream.py** → `Listener.stream`, the chat, the server.
"""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer. A character whose bytes are not complete is held back, and so is trailing white space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start()
        self._space = ""  # white space that is the answer's end, unless more text follows
        self._begun = False

    def push(self, token: int) -> str:
        """The text that this token completes; often none."""
        try:
            text = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        except Exception:  # a byte token that no character contains: some tokenizers void the bytes before it too
            self._start()
            text = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        self._ids.append(token)
        self._decoded += len(text)
        return self._trim(text)

    def close(self) -> str:
        """What is left at the answer's end, incomplete characters included."""
        return self._trim(answer_text(self._tokenizer, self._ids)[self._decoded :])

    def _start(self) -> None:
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []  # tokens since the start
        self._decoded = 0  # characters that the decoder has returned for them

    def _trim(self, text: str) -> str:
        text = self._space + text
        text = text if self._begun else text.lstrip()
        certain = text.rstrip()
        self._space = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer's tokens, control tokens left out, spaces as they were written."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
