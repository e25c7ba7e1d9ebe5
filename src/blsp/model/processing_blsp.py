"""Processor: text and speech to the model's inputs, and tokens back to text.

In:  text with `<|audio|>` where a clip belongs (or a conversation, through `apply_chat_template`), and clips.
Out: `input_ids` with a placeholder for every audio token, `attention_mask`, `input_features`, `input_features_mask`.
Try: `processor(text=prompt, audio=[array], sampling_rate=16000, return_tensors="pt")`
Flow: audio and text → **inputs** → `BlspForConditionalGeneration`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, WhisperFeatureExtractor

from blsp.data.audio import SAMPLE_RATE, load_audio
from blsp.llm.instructions import instruction_for, language_name
from blsp.llm.prompt import fix_template, fix_tokenizer
from blsp.model.adapter_parts import num_audio_tokens
from blsp.model.configuration_blsp import AUDIO_TOKEN
from blsp.model.speech_encoder import encoder_frames, mel_features, mel_frames

# Arguments of `processor(…)` that are passed on to the tokenizer
TOKENIZER_ARGUMENTS = (
    *("truncation", "max_length", "pad_to_multiple_of", "return_attention_mask", "return_length", "verbose"),
    *("return_offsets_mapping", "return_special_tokens_mask"),
)
OWN_ARGUMENTS = (
    *("text", "audio", "sampling_rate", "return_tensors", "padding", "padding_side", "add_special_tokens"),
    "return_text_replacement_offsets",
)

# Joins the parts of a message into one string, then runs the LLM's own template, unchanged. A user's text is stripped
# and begins on a new line after speech or text, as in training (llm/prompt.py) and in inference/conversation.py.
FLATTEN_PARTS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set text = namespace(value='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'audio' -%}
        {%- set piece = '<|audio|>' -%}
      {%- elif message['role'] != 'user' -%}
        {%- set piece = part['text'] -%}
      {%- elif part['text'] | trim and text.value -%}
        {%- set piece = '\\n' + part['text'] | trim -%}
      {%- else -%}
        {%- set piece = part['text'] | trim -%}
      {%- endif -%}
      {%- set text.value = text.value + piece -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.value}] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


class BlspProcessor(ProcessorMixin):
    """A Whisper feature extractor and the LLM's tokenizer.

    Args:
        strides: of the adapter; they tell how many audio tokens a clip has.
        full_window: pad the encoder's input to 30 s (must agree with the model's configuration).
        template_args: variables of the LLM's chat template in every prompt (must also agree).
    """

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        strides: Sequence[int] = (2, 2, 2),
        full_window: bool = False,
        chat_template: str | None = None,
        template_args: dict[str, Any] | None = None,
    ) -> None:
        self.strides = list(strides)
        self.full_window = full_window
        self.audio_token = AUDIO_TOKEN
        if AUDIO_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        fix_tokenizer(tokenizer, template_args)
        if chat_template is None and tokenizer.chat_template:
            chat_template = FLATTEN_PARTS + tokenizer.chat_template
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.fix_template(template_args)

    def fix_template(self, template_args: dict[str, Any] | None) -> None:
        """Set variables of the LLM's chat template for all prompts; None keeps those that are set."""
        self.template_args = template_args or None
        fix_tokenizer(self.tokenizer, template_args)
        template: Any = self.chat_template
        if isinstance(template, str):
            self.chat_template: Any = fix_template(template, template_args)

    def num_audio_tokens(self, samples: int) -> int:
        """Placeholders of a clip of `samples` 16 kHz samples."""
        return num_audio_tokens(encoder_frames(mel_frames(samples)), self.strides)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        add_special_tokens: bool = False,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Text (one or a list) with one `<|audio|>` per clip; clips as 16 kHz arrays, or any rate with `sampling_rate`.

        Args:
            padding_side: "left", as generation needs it, or "right".
            return_text_replacement_offsets: also return what replaced each `<|audio|>`, as
                `text_replacement_offsets`, for vLLM.
            kwargs: for the tokenizer (TOKENIZER_ARGUMENTS). Others raise a TypeError, unless they are None.
        """
        options = {name: value for name, value in kwargs.items() if value is not None}
        for name in options.keys() - set(TOKENIZER_ARGUMENTS):
            known = ", ".join(OWN_ARGUMENTS + TOKENIZER_ARGUMENTS)
            raise TypeError(f"Keyword argument `{name}` is not a valid argument for this processor; it takes {known}")
        texts = [text] if isinstance(text, str) else list(text or [])
        clips = self._clips(audio, sampling_rate)
        count = sum(piece.count(AUDIO_TOKEN) for piece in texts)
        if count != len(clips):
            raise ValueError(f"{count} × {AUDIO_TOKEN} in the text, but {len(clips)} clips: each clip needs its place")
        placeholders = [AUDIO_TOKEN * self.num_audio_tokens(len(clip)) for clip in clips]
        expanded, offsets = self.get_text_with_replacements(texts, audio_replacements=placeholders)
        data = dict(
            self.tokenizer(
                expanded,
                padding=padding,
                padding_side=padding_side,
                add_special_tokens=add_special_tokens,
                return_tensors=return_tensors,
                **options,
            )
        )
        self._check_special_mm_tokens(expanded, data, modalities=["audio"])  # truncation may cut placeholders off
        data.pop("token_type_ids", None)
        if clips:
            features, mask = mel_features(self.feature_extractor, clips, full_window=self.full_window)
            data |= {"input_features": features, "input_features_mask": mask}
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_text_replacement_offsets:
            batch["text_replacement_offsets"] = offsets
        return batch

    def apply_transcription_request(
        self,
        audio: Any,
        language: str | Sequence[str | None] | None = None,
        sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs for `generate` that ask the LLM to repeat the words of each clip (the behaviour `repeat`).

        language: one for all clips or one for each, as in Voxtral's processor. It is checked but has no effect, since
            the LLM repeats the words in the language that is spoken. kwargs: those of `processor(…)`.
        """
        clips = self._clips(audio, sampling_rate)
        languages = [language] * len(clips) if language is None or isinstance(language, str) else list(language)
        if len(languages) != len(clips):
            raise ValueError(f"{len(languages)} languages for {len(clips)} clips: give one for all, or one for each")
        for name in filter(None, languages):
            language_name(name)  # raises an error for an unknown code
        message = {"role": "user", "content": instruction_for("repeat") + AUDIO_TOKEN}
        prompt = self.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return self(text=[prompt] * len(clips), audio=clips, **kwargs)

    @staticmethod
    def _clips(audio: Any, sampling_rate: int | None) -> list[np.ndarray]:
        if audio is None:
            return []
        flat = audio if isinstance(audio, (list, tuple)) else [audio]
        while flat and isinstance(flat[0], (list, tuple)):
            flat = [clip for clips in flat for clip in clips]
        return [_samples(clip, sampling_rate) for clip in flat]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "input_features_mask"]


def _samples(clip: Any, sampling_rate: int | None) -> np.ndarray:
    """A clip as 16 kHz samples (N,), from an array, a tensor or a `{"array", "sampling_rate"}` of datasets."""
    if isinstance(clip, dict):
        source = clip.get("array") if clip.get("array") is not None else clip.get("bytes") or clip.get("path")
        return _samples(source, clip.get("sampling_rate", sampling_rate))
    if isinstance(clip, torch.Tensor):
        clip = clip.detach().cpu().float().numpy()
    return load_audio(clip, sampling_rate=(sampling_rate or SAMPLE_RATE) if isinstance(clip, np.ndarray) else None)
