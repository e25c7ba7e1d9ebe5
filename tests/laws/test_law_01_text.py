"""Law 1: text-only logits and answers equal the plain LLM's, for all families."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, TOLERANCE, CausalLM, runtime_of

from blsp.distributed import find_runtime
from blsp.llm.language_model import UnsupportedModelError, check_supported
from blsp.model.checkpoint import new_blsp
from blsp.weights.digest import find_weights
from blsp.weights.embedded import EmbeddedWeightsError

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def _same(found: torch.Tensor, expected: torch.Tensor, family: str) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[family])


@FAMILY
@torch.no_grad()
def test_logits_equal_the_plain_llm(pair_of, tiny_llm, family: str) -> None:
    model, _ = pair_of("conv", family)
    llm = CausalLM.from_pretrained(tiny_llm(family), dtype=runtime_of(family).dtype)
    ids = torch.randint(3, 300, (3, 40))
    _same(model(input_ids=ids).logits, llm(input_ids=ids).logits, family)
    _same(model(input_ids=ids, logits_to_keep=5).logits, llm(input_ids=ids).logits[:, -5:], family)


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits_equal_the_plain_llm_without_padding(pair_of, tiny_llm, family: str, side: str) -> None:
    model, _ = pair_of("conv", family)
    llm = CausalLM.from_pretrained(tiny_llm(family), dtype=runtime_of(family).dtype)
    short = torch.randint(3, 300, (1, 25))
    pad = (15, 0) if side == "left" else (0, 15)
    ids = torch.nn.functional.pad(short, pad)
    mask = torch.nn.functional.pad(torch.ones_like(short), pad)
    found = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    _same(found, llm(input_ids=short).logits[0], family)


@FAMILY
def test_answers_equal_the_plain_llm(pair_of, tiny_llm, family: str) -> None:
    model, _ = pair_of("conv", family)
    llm = CausalLM.from_pretrained(tiny_llm(family), dtype=runtime_of(family).dtype)
    ids = torch.randint(3, 300, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **settings), llm.generate(ids, **settings))


@FAMILY
@torch.no_grad()
def test_steps_with_a_cache_equal_the_whole(pair_of, family: str) -> None:
    model, _ = pair_of("conv", family)
    ids = torch.randint(3, 300, (2, 30))
    first = model(input_ids=ids[:, :18], use_cache=True)
    second = model(input_ids=ids[:, 18:], past_key_values=first.past_key_values, use_cache=True)
    _same(torch.cat([first.logits, second.logits], dim=1), model(input_ids=ids).logits, family)


def test_families_that_cannot_be_driven_are_refused_by_name() -> None:
    from transformers import MambaConfig, T5Config, WhisperConfig

    for config in (T5Config(), MambaConfig(), WhisperConfig()):
        with pytest.raises(UnsupportedModelError, match=config.model_type):
            check_supported(config)


@pytest.mark.embedded
@torch.no_grad()
def test_the_embedded_llm_keeps_its_logits() -> None:
    names = ("embedded:whisper-tiny.en", "embedded:smollm2-135m-instruct")
    try:
        encoder, llm = (find_weights(name) for name in names)
    except EmbeddedWeightsError as error:
        pytest.skip(str(error))
    model, processor = new_blsp(encoder, llm, find_runtime("cpu", "float32"))
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = CausalLM.from_pretrained(llm.folder, dtype=torch.float32)(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
