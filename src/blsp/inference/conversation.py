"""Conversations: turns of text and speech, with the key/values of earlier turns reused.

In:  a `Listener`, and turns: text, clips (`AudioEmbeds`), or both, in any order.
Out: answers, piece by piece.
Try: `talk = Conversation(listener); print("".join(talk.ask("What did I say?", *listener.embed_audio(["a.wav"]))))`
Flow: inference/ — used by `blsp chat` and the server.

A conversation is a sequence of positions. Each has an embedding and a name: a token id, or a clip's digest with a
number. With the names, the key/values of the longest common beginning are found and reused.

    turn 1   <user> What is this ? (clip,0) (clip,1) <end> <assistant>     and the answer:  A dog . <end>
    turn 2   <user> What is this ? (clip,0) (clip,1) <end> <assistant> A dog .   <end> <user> Sure ? <end> <assistant>
             |---------------------- reused from the memory ----------------|   |------------- computed ------------|

Shapes: L positions, D LLM width.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blsp.inference.listener import Listener, decode_alone
from blsp.llm.decoding import Decoder, Decoding, Event, Request, TextStream
from blsp.llm.language_model import embed
from blsp.llm.prefix import Prefix
from blsp.llm.prompt import Speech, render
from blsp.model.adapter_parts import AudioEmbeds

Content = str | AudioEmbeds | tuple[int, ...]  # text, a clip, or the ids of an earlier answer


class ContextError(ValueError):
    """A conversation that is too long for the LLM; the message names both lengths."""


@dataclass(frozen=True)
class LaidOut:
    """A conversation as input of the LLM: a name and an embedding (L, D) for each position."""

    names: tuple[Hashable, ...]
    embeds: Tensor


def user_turn(parts: Sequence[str | AudioEmbeds]) -> dict[str, Any]:
    """A user's message; text after another part starts on a new line, as in a speech-first prompt."""
    content: list[Content] = []
    for part in parts:
        if isinstance(part, str):
            part = part.strip()
            if not part:
                continue
            part = "\n" + part if content else part
        content.append(part)
    return {"role": "user", "content": content}


def lay_out(listener: Listener, messages: Sequence[dict[str, Any]]) -> LaidOut:
    """Messages (`{"role", "content"}`, content a string or a list of `Content`) as input of the LLM.

    Raises ContextError if the conversation is longer than the LLM can read.
    """
    clips: list[AudioEmbeds] = []
    marked = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else list(content)
        for i, part in enumerate(parts):
            if isinstance(part, AudioEmbeds):
                parts[i] = Speech(len(clips))
                clips.append(part)
        marked.append({"role": message["role"], "content": parts})
    segments = render(listener.tokenizer, marked)
    length = sum(len(clips[part.index].vectors) if isinstance(part, Speech) else len(part) for part in segments)
    _check_length(listener, length)  # before the embeddings, which need a thousand times more memory than ids
    names: list[Hashable] = []
    embeds: list[Tensor] = []
    for segment in segments:
        if isinstance(segment, Speech):
            vectors = clips[segment.index].vectors.to(listener.model.lm_head.weight.dtype)
            digest = hashlib.blake2b(vectors.detach().cpu().float().numpy().tobytes(), digest_size=16).digest()
            names += [(digest, i) for i in range(len(vectors))]
            embeds.append(vectors)
        else:
            names += segment
            embeds.append(embed(listener.model, segment))
    return LaidOut(tuple(names), torch.cat(embeds).detach())


class Memory:
    """Key/values of the most recently used sequences, found by the names of their positions.

    sequences: the largest number of stored sequences. positions: the largest number of positions of all of them; the
    latest sequence is always stored.
    owner: of a sequence. Sequences of one owner are not used for another: otherwise the time to the first token would
    show whether somebody else has sent the same prompt.
    """

    def __init__(self, sequences: int = 1, positions: int | None = None) -> None:
        self._sequences, self._positions = sequences, positions
        # by owner and names; the latest is last
        self._stored: OrderedDict[tuple[Hashable, tuple[Hashable, ...]], Prefix] = OrderedDict()

    def store(self, names: tuple[Hashable, ...], states: Prefix, owner: Hashable = None) -> None:
        """Store `states`, one position for each of `names`; drop stored beginnings of the same sequence."""
        for stored in self._of(owner):
            if stored == names[: len(stored)]:
                del self._stored[owner, stored]
        self._stored[owner, names] = states
        most = math.inf if self._positions is None else self._positions
        while len(self._stored) > self._sequences or (len(self._stored) > 1 and self._length > most):
            self._stored.popitem(last=False)

    def longest(self, names: tuple[Hashable, ...], owner: Hashable = None) -> Prefix | None:
        """The states of the longest stored beginning of `names`; of several, the latest.

        At least one position is left out, since the LLM must run to give the next token.
        """
        best = max(reversed(self._of(owner)), key=lambda stored: _common(stored, names), default=())
        length = min(_common(best, names), len(names) - 1)
        if length <= 0:
            return None
        self._stored.move_to_end((owner, best))
        return self._stored[owner, best].cut(length)

    @property
    def _length(self) -> int:
        """Positions of all sequences."""
        return sum(len(names) for _, names in self._stored)

    def _of(self, owner: Hashable) -> list[tuple[Hashable, ...]]:
        """The names of an owner's sequences; the latest is last."""
        return [names for stored, names in self._stored if stored == owner]


def _common(first: tuple[Hashable, ...], second: tuple[Hashable, ...]) -> int:
    """The number of equal positions at the beginning of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _check_length(listener: Listener, length: int, answer: int = 1) -> None:
    """Raise ContextError if `length` tokens and an answer of `answer` tokens are more than the LLM can read."""
    limit = getattr(listener.model.config.text_config, "max_position_embeddings", None)
    if limit is not None and length + answer > limit:
        raise ContextError(
            f"the conversation has {length} tokens and the answer may have {answer}, but the LLM reads {limit}: "
            "start a new conversation, or ask for a shorter answer"
        )


def request_for(
    listener: Listener, key: Hashable, laid_out: LaidOut, decoding: Decoding, memory: Memory, owner: Hashable = None
) -> Request:
    """The conversation as a request of the decoder, after the longest beginning in the owner's `memory`.

    Raises ContextError if conversation and answer would be longer than the LLM can read.
    """
    _check_length(listener, len(laid_out.names), decoding.max_new_tokens)
    prefix = memory.longest(laid_out.names, owner)
    embeds = laid_out.embeds[len(prefix) if prefix else 0 :]
    return Request(key, embeds, prefix, decoding, keep_cache=True)


def remember(memory: Memory, laid_out: LaidOut, ids: Sequence[int], last: Event, owner: Hashable = None) -> None:
    """Store the key/values of a finished answer. ids: its tokens without the stop token. last: its last event."""
    if last.cache is not None:
        memory.store((*laid_out.names, *ids)[: len(last.cache)], last.cache, owner)


class Conversation:
    """Several turns with one listener. messages: the conversation so far, beginning with the system message."""

    def __init__(
        self,
        listener: Listener,
        *,
        system: str | None = None,
        decoding: Decoding | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.listener = listener
        self.system = system
        self.decoding = decoding or listener.decoding
        self.memory = memory or Memory()
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, *parts: str | AudioEmbeds) -> Iterator[str]:
        """The answer to a turn of text and clips, piece by piece.

        The written part of an interrupted answer stays in the conversation. If the clips hold no speech, the answer is
        the model's fixed sentence, and the turn is not added to the conversation.
        """
        if not any(isinstance(part, AudioEmbeds) or part.strip() for part in parts):
            raise ValueError("nothing was asked: give text, a clip, or both")
        clips = [part for part in parts if isinstance(part, AudioEmbeds)]
        if clips and not any(clip.speech for clip in clips):
            yield self.listener.model.config.no_speech_sentence
            return
        turn = user_turn([part for part in parts if isinstance(part, str) or part.speech])
        laid_out = lay_out(self.listener, [*self.messages, turn])
        request = request_for(self.listener, 0, laid_out, self.decoding, self.memory)
        ids: list[int] = []
        failed = False
        try:
            yield from self._answer(laid_out, request, ids)
        except Exception:
            failed = True
            raise
        finally:  # also if the caller stops reading or interrupts
            if not failed:
                self.messages += [turn, {"role": "assistant", "content": [tuple(ids)]}]

    def _answer(self, laid_out: LaidOut, request: Request, ids: list[int]) -> Iterator[str]:
        """Stream the text of `request`; its ids are added to `ids`."""
        text = TextStream(self.listener.tokenizer)
        for event in decode_alone(Decoder(self.listener.model), request):
            if event.finish:
                ids += [event.token] if event.finish == "length" else []
                remember(self.memory, laid_out, ids, event)
                piece = (text.push(event.token) if event.finish == "length" else "") + text.close()
            else:
                ids.append(event.token)
                piece = text.push(event.token)
            if piece:
                yield piece
