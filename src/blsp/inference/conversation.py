"""Several turns of text and speech, with the key/values of what was said kept from turn to turn.

In:  a `Listener`, and turns: text, clips that were heard (`AudioEmbeds`), or both, in any order.
Out: answers, piece by piece.
Try: `talk = Conversation(listener); print("".join(talk.ask("What did I say?", *listener.embed_audio(["a.wav"]))))`
Flow: inference/ — the terminal's chat and the server both lay conversations out here.

A conversation becomes a row of positions, each with a name (a token id, or a clip's digest and a place in it) and
an embedding. What was run before is found again by its names: key/values of the longest common beginning are
reused, and only the rest goes through the LLM.

Letters: L sequence, D LLM width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blsp.inference.listener import Listener, written
from blsp.llm.decoding import Decoder, Decoding, Event, Request
from blsp.llm.language_model import embed
from blsp.llm.prefix import Prefix
from blsp.llm.prompt import Speech, render
from blsp.llm.text_stream import TextStream
from blsp.model.adapter_parts import AudioEmbeds

Content = str | AudioEmbeds | tuple[int, ...]  # text, a clip, or the ids of an answer that was written


class ContextError(ValueError):
    """A conversation that is longer than the LLM can read; the message says by how much."""


@dataclass(frozen=True)
class LaidOut:
    """A conversation as the LLM gets it: a name and an embedding (L, D) for each position."""

    names: tuple[Hashable, ...]
    embeds: Tensor


def user_turn(parts: Sequence[str | AudioEmbeds]) -> dict[str, Any]:
    """A user's message; text after speech begins a new line, as in a speech-first prompt."""
    content: list[Content] = []
    for part in parts:
        if isinstance(part, str):
            part = part.strip()
            part = "\n" + part if part and content and isinstance(content[-1], AudioEmbeds) else part
        content.append(part)
    return {"role": "user", "content": content}


def lay_out(listener: Listener, messages: Sequence[dict[str, Any]]) -> LaidOut:
    """Messages (`{"role", "content"}`, content a string or a list of `Content`), ready to be answered."""
    clips: list[AudioEmbeds] = []
    marked = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else list(content)
        for place, part in enumerate(parts):
            if isinstance(part, AudioEmbeds):
                parts[place] = Speech(len(clips))
                clips.append(part)
        marked.append({"role": message["role"], "content": parts})
    names: list[Hashable] = []
    embeds: list[Tensor] = []
    for segment in render(listener.tokenizer, marked):
        if isinstance(segment, Speech):
            vectors = clips[segment.index].vectors.to(listener.model.lm_head.weight.dtype)
            digest = _digest(vectors)
            names += [(digest, place) for place in range(len(vectors))]
            embeds.append(vectors)
        else:
            names += segment
            embeds.append(embed(listener.model, segment))
    return LaidOut(tuple(names), torch.cat(embeds).detach())


def _digest(vectors: Tensor) -> bytes:
    return hashlib.blake2b(vectors.detach().cpu().float().numpy().tobytes(), digest_size=16).digest()


class Memory:
    """Key/values of sequences that were run, the most recently used `kept` of them, found by their names.

    positions: how many they may have together; the latest is kept whatever its length.
    """

    def __init__(self, kept: int = 1, positions: int | None = None) -> None:
        self._kept, self._positions = kept, positions
        self._runs: OrderedDict[tuple[Hashable, ...], Prefix] = OrderedDict()

    def keep(self, names: tuple[Hashable, ...], states: Prefix) -> None:
        """Remember `states`, which hold one position for each of `names`; beginnings of it are forgotten."""
        for older in [older for older in self._runs if older == names[: len(older)]]:
            del self._runs[older]
        self._runs[names] = states
        while len(self._runs) > self._kept or (len(self._runs) > 1 and self._too_many()):
            self._runs.popitem(last=False)

    def _too_many(self) -> bool:
        return self._positions is not None and sum(map(len, self._runs)) > self._positions

    def longest(self, names: tuple[Hashable, ...]) -> Prefix | None:
        """The states of the longest beginning of `names` that was run, the latest of several; one position at
        least is left to run."""
        best = max(reversed(self._runs), key=lambda run: _common(run, names), default=())
        length = min(_common(best, names), len(names) - 1)
        if length <= 0:
            return None
        self._runs.move_to_end(best)
        return self._runs[best].cut(length)


def _common(first: tuple[Hashable, ...], second: tuple[Hashable, ...]) -> int:
    """How many positions two sequences share from their beginnings on."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def request_for(
    listener: Listener, key: Hashable, laid: LaidOut, decoding: Decoding, memory: Memory
) -> Request:
    """The laid-out conversation as the decoder takes it: what `memory` holds is not run again.

    Raises ContextError where conversation and answer would be longer than the LLM can read.
    """
    most = getattr(listener.model.config.text_config, "max_position_embeddings", None)
    if most is not None and len(laid.names) + decoding.max_new_tokens > most:
        raise ContextError(
            f"the conversation has {len(laid.names)} tokens and the answer may have {decoding.max_new_tokens}, "
            f"but the LLM reads {most}: start anew or ask for less"
        )
    known = memory.longest(laid.names)
    return Request(key, laid.embeds[len(known) if known else 0 :], known, decoding, keep_cache=True)


def remember(memory: Memory, laid: LaidOut, ids: Sequence[int], last: Event) -> None:
    """Keep what the finished answer `ids` (without the stop token) has run, from its last event."""
    if last.cache is not None:
        memory.keep((*laid.names, *ids)[: len(last.cache)], last.cache)


class Conversation:
    """Turns with one listener. `messages` holds what was said so far, the system message first."""

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

        An answer that is broken off stays in the conversation as far as it came. A turn whose clips hold no speech
        is answered with the model's fixed sentence and forgotten.
        """
        if not any(isinstance(part, AudioEmbeds) or part.strip() for part in parts):
            raise ValueError("nothing was asked: give text, a clip, or both")
        clips = [part for part in parts if isinstance(part, AudioEmbeds)]
        if clips and not any(clip.speech for clip in clips):
            yield self.listener.model.config.no_speech_sentence
            return
        turn = user_turn([part for part in parts if isinstance(part, str) or part.speech])
        laid = lay_out(self.listener, [*self.messages, turn])
        request = request_for(self.listener, 0, laid, self.decoding, self.memory)
        ids: list[int] = []
        failed = False
        try:
            yield from self._answer(laid, request, ids)
        except Exception:
            failed = True
            raise
        finally:  # also when the reader leaves or interrupts
            if not failed:
                self.messages += [turn, {"role": "assistant", "content": [tuple(ids)]}]

    def _answer(self, laid: LaidOut, request: Request, ids: list[int]) -> Iterator[str]:
        """Stream the text of `request`, gathering its ids."""
        text = TextStream(self.listener.tokenizer)
        for event in written(Decoder(self.listener.model), request):
            if event.finish:
                ids += [event.token] if event.finish == "length" else []
                remember(self.memory, laid, ids, event)
                piece = (text.push(event.token) if event.finish == "length" else "") + text.close()
            else:
                ids.append(event.token)
                piece = text.push(event.token)
            if piece:
                yield piece
