"""Tokens in, text out, as soon as it is certain.

In:  the tokens of one answer, one at a time.
Out: pieces of text; together they are the decoded answer without the white space around it.
Try: `stream = TextStream(tokenizer); print(stream.push(token)); print(stream.close())`
Flow: inference/ — `Listener.stream`, the chat and the server show their answers through it.

A character whose bytes are not complete yet is held back, and so is white space that may turn out to be the last.
Only the tokens since the piece before last are decoded again, so a long answer costs no more a token than a short.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder puts where bytes are missing


class TextStream:
    """The text of one answer, growing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = self._read = 0  # decoded again from `begin`; shown up to `read`
        self._space = ""
        self._begun = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; often none."""
        self._ids.append(token)
        return self._show(final=False)

    def close(self) -> str:
        """What is left at the answer's end."""
        return self._show(final=True)

    def _show(self, *, final: bool) -> str:
        shown = self._decode(self._ids[self._begin : self._read])
        text = self._decode(self._ids[self._begin :])
        if not final and (len(text) <= len(shown) or text.endswith(INCOMPLETE)):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._trim(text[len(shown) :])

    def _trim(self, text: str) -> str:
        text = self._space + text
        text = text if self._begun else text.lstrip()
        certain = text.rstrip()
        self._space = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain

    def _decode(self, ids: list[int]) -> str:
        return answer_text(self._tokenizer, ids)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer's tokens, control tokens left out, spaces as they were written."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
