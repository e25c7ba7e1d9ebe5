"""The decode loop as the server drives it: rows join and leave between steps, samples are reproducible, and a
finished row's key/values can be gone on from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import IM_END, tiny_blsp

from blsp.llm.decoding import Decoder, Decoding, Event, Request, decode
from blsp.llm.kv_cache import COLUMNS_AT_A_TIME
from blsp.llm.language_model import embed
from blsp.llm.prefix import compute_prefix
from blsp.model.modeling_blsp import BlspForConditionalGeneration


@pytest.fixture(scope="module")
def model(tiny_models_folder: Path) -> BlspForConditionalGeneration:
    return tiny_blsp(tiny_models_folder, family="qwen2")[0]


def _request(model: torch.nn.Module, key: int, length: int, **decoding: object) -> Request:
    generator = torch.Generator().manual_seed(key)
    ids = torch.randint(3, 300, (length,), generator=generator)
    return Request(key, embed(model, ids).detach(), None, Decoding(**{"max_new_tokens": 10, **decoding}))


def _alone(model: torch.nn.Module, request: Request) -> list[int]:
    return decode(model, [request], 1)[request.key].ids


@given(
    script=st.lists(st.sampled_from(["join", "step", "step", "leave"]), min_size=5, max_size=60),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_rows_that_join_and_leave_write_what_they_write_alone(model, script: list[str], seed: int) -> None:
    """Any interleaving; rows taken out early have written a beginning of it."""
    chance = random.Random(seed)
    decoder, requests, written, left = Decoder(model), {}, {}, set()

    def note(events: list[Event]) -> None:
        for event in events:
            written.setdefault(event.key, []).append(event.token)

    for action in script:
        if action == "join":
            keys = range(len(requests), len(requests) + chance.randint(1, 3))
            joining = [_request(model, key, chance.randint(1, 90), stop_ids=(5, 17, 33, 120)) for key in keys]
            requests |= {request.key: request for request in joining}
            note(decoder.join(joining))
        elif action == "step" and len(decoder):
            note(decoder.step())
        elif action == "leave" and requests:
            key = chance.choice(list(requests))
            left.add(key)
            decoder.leave(key)
    while len(decoder):
        note(decoder.step())
    for key, request in requests.items():
        expected = decode(model, [request], 1)[key]
        answer = [token for token in written[key] if token not in request.decoding.stop_ids]
        assert answer == expected.ids[: len(answer)]
        assert key in left or len(answer) == len(expected.ids)


def test_slots_are_used_again(model) -> None:
    """A server runs for ever: columns must not grow with the tokens ever written."""
    decoder = Decoder(model)
    for key in range(40):
        decoder.join([_request(model, key, 30, max_new_tokens=20)])
        for _ in range(10):
            decoder.step()
    assert decoder._slots is not None
    assert decoder._slots.layers[0].buffer_keys.shape[2] <= 4 * COLUMNS_AT_A_TIME
    while len(decoder):
        decoder.step()


def test_samples_depend_on_the_seed_alone(model) -> None:
    request = _request(model, 0, 12, temperature=1.0, seed=7, max_new_tokens=20)
    company = [_request(model, key, 5 * key, temperature=0.7, seed=key, max_new_tokens=20) for key in range(1, 5)]
    expected = _alone(model, request)
    assert decode(model, [*company, request], 5)[0].ids == expected
    torch.manual_seed(99)
    assert _alone(model, request) == expected
    assert _alone(model, _request(model, 0, 12, temperature=1.0, seed=8, max_new_tokens=20)) != expected


def test_samples_follow_the_distribution(model) -> None:
    """Nucleus: only the likeliest tokens that together reach top_p; a cold sample is the greedy answer."""
    greedy = _request(model, 0, 12, top_k_logprobs=320)
    logp = decode(model, [greedy], 1)[0].top_logp[0].exp()
    ids = decode(model, [greedy], 1)[0].top_ids[0]
    nucleus = set(ids[: int((logp.cumsum(0) < 0.5).sum()) + 1].tolist())
    drawn = {
        _alone(model, _request(model, 0, 12, temperature=1.0, top_p=0.5, seed=seed, max_new_tokens=1))[0]
        for seed in range(60)
    }
    assert drawn <= nucleus
    assert len(drawn) > 1 or len(nucleus) == 1
    for cold in ({"temperature": 1e-4}, {"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}):
        assert _alone(model, _request(model, 0, 12, **cold, seed=3)) == _alone(model, greedy)


@pytest.mark.parametrize("finish", ["stop", "length"])
@torch.no_grad()
def test_a_kept_cache_is_gone_on_from(model, finish: str) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (14,), generator=generator).tolist()
    decoding = Decoding(max_new_tokens=6)
    answer = decode(model, [Request(0, embed(model, ids), None, decoding)], 1)[0].ids
    if finish == "stop":
        decoding = Decoding(max_new_tokens=6, stop_ids=(answer[3],))
        answer = answer[: answer.index(answer[3])]
    prefix = compute_prefix(model, ids[:5])
    request = Request(0, embed(model, ids[5:]), prefix, decoding, keep_cache=True)
    other = _request(model, 1, 40, max_new_tokens=30)
    decoder = Decoder(model)
    events = decoder.join([request, other])
    while len(decoder):
        events += decoder.step()
    last = next(event for event in events if event.key == 0 and event.finish)
    assert last.finish == finish
    fed = [*ids, *answer] if finish == "stop" else [*ids, *answer[:-1]]
    assert last.cache is not None
    assert len(last.cache) == len(fed)
    more = torch.randint(3, 300, (4,), generator=generator).tolist()
    onwards = Decoding(max_new_tokens=8, stop_ids=(IM_END,))
    found = decode(model, [Request(0, embed(model, more), last.cache, onwards)], 1)[0].ids
    assert found == decode(model, [Request(0, embed(model, [*fed, *more]), None, onwards)], 1)[0].ids
    shorter = decode(model, [Request(0, embed(model, more), last.cache.cut(7), onwards)], 1)[0].ids
    assert shorter == decode(model, [Request(0, embed(model, [*fed[:7], *more]), None, onwards)], 1)[0].ids


def test_results_say_how_they_ended(model) -> None:
    request = _request(model, 0, 9)
    whole = decode(model, [request], 1)[0]
    assert (whole.finish, len(whole.ids)) == ("length", 10)
    stop = whole.ids[4]
    first = whole.ids.index(stop)
    stopped = decode(model, [_request(model, 0, 9, stop_ids=(stop,), top_k_logprobs=3)], 1)[0]
    assert (stopped.finish, stopped.ids) == ("stop", whole.ids[:first])
    assert stopped.top_ids is not None
    assert stopped.top_ids.shape == (first + 1, 3)
    assert int(stopped.top_ids[-1, 0]) == stop


def test_no_requests_give_no_results(model) -> None:
    assert decode(model, [], 4) == {}


def test_what_cannot_be_decoded_is_refused(model) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        decode(model, [], 0)
    with pytest.raises(ValueError, match="has no embeddings"):
        decode(model, [Request(0, torch.zeros(0, 32, dtype=torch.float64))], 1)
