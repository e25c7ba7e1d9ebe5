"""The model: a frozen Whisper encoder, the adapter, and a frozen LLM, under Hugging Face's conventions.

In:  `input_ids` with a placeholder for every vector of speech, and the speech's log-mel features and mask.
Out: the LLM's outputs; `generate` works as for any transformers model.
Try: `BlspForConditionalGeneration.from_pretrained("models/blsp-tiny")`
Flow: processor → **audio_tower → multi_modal_projector → language_model** → text.

A checkpoint folder holds the adapter alone; `from_pretrained` loads the frozen parts that its configuration
names and checks their digests (checkpoint.py). Placeholders are replaced in the embeddings; places of a
`grounded` adapter that hold no vector are masked, and positions count only what is attended.

Letters: B batch, M mel bins, Tm mel frames, T encoder frames, S places, N vectors of all clips, L sequence,
E encoder width, D LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blsp.llm.language_model import (
    UnsupportedModelError,
    check_supported,
    head_has_bias,
    scale_logits,
    valid_mask,
)
from blsp.model.adapter import AdapterOutput, AudioEmbeds, ConvAdapter, StackAdapter
from blsp.model.configuration_blsp import BlspConfig
from blsp.model.grounded import GroundedAdapter
from blsp.model.hypotheses import hypotheses_of
from blsp.model.packing import pack, unpack
from blsp.model.speech_encoder import encode_speech

ADAPTERS: dict[str, type[nn.Module]] = {
    "conv": ConvAdapter,
    "stack": StackAdapter,
    "grounded": GroundedAdapter,
}


@dataclass
class BlspAudioOutput(BaseModelOutputWithPooling):
    """`pooler_output` (N, D): the vectors of all places of all clips; `valid` (N,): which places hold one."""

    valid: Tensor | None = None
    adapter: AdapterOutput | None = None

    @property
    def complete(self) -> bool:
        """Whether every place holds a vector."""
        return self.valid is None or bool(self.valid.all())


class BlspPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of both classes."""

    config_class = BlspConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ("past_key_values",)

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves: the adapter in its constructor, the frozen ones from files."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter folder (with the frozen parts it names, digests checked) or a merged export.

        Raises CheckpointError rather than leave a tensor at its random first value.
        """
        from blsp.model.checkpoint import is_adapter_folder, load_adapter_folder, refuse_missing

        informed = kwargs.pop("output_loading_info", False)
        found: dict[str, Any] = {"missing_keys": set()}
        if is_adapter_folder(pretrained_model_name_or_path):
            whole = load_adapter_folder(pretrained_model_name_or_path, **kwargs)
            model: Any = whole.model if issubclass(cls, BlspModel) else whole
        else:
            model, found = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            refuse_missing(pretrained_model_name_or_path, found["missing_keys"])
        return (model, found) if informed else model


class BlspModel(BlspPreTrainedModel):
    """Encoder, adapter and the LLM without its head."""

    def __init__(self, config: BlspConfig) -> None:
        super().__init__(config)
        check_supported(config.text_config)
        if config.audio_config.model_type != "whisper":
            raise UnsupportedModelError(
                f"{config.audio_config.model_type}: the speech encoder must be a Whisper"
            )
        self.audio_tower = WhisperEncoder(config.audio_config)
        self.multi_modal_projector = build_adapter(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._readout: tuple[Any, Tensor] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def readout_table(self) -> Tensor | None:
        """(K-1, D): the LLM's embeddings of the read-out vocabulary; None where nothing is read out.

        Gathered once, and again when the embeddings have changed or moved.
        """
        if self.config.adapter != "grounded":
            return None
        table = self.get_input_embeddings()
        if self.config.readout_vocabulary is None and type(table) is nn.Embedding:
            return table.weight
        weight = table.weight
        state = (
            weight.data_ptr(),
            weight._version,
            weight.dtype,
            weight.device,
            self.config.readout_vocabulary,
        )
        if self._readout is None or self._readout[0] != state:
            ids = self.config.readout_vocabulary or range(self.config.text_config.vocab_size)
            rows = table(torch.tensor(list(ids), device=weight.device))
            if weight.requires_grad:
                return rows
            self._readout = (state, rows)
        return self._readout[1]

    def listen(self, states: Tensor, lengths: Tensor) -> AdapterOutput:
        """The adapter on encoder states (B, T, E) with lengths (B,); readouts in the LLM's ids."""
        weight = next(self.multi_modal_projector.parameters())
        output = self.multi_modal_projector(states.to(weight.dtype), lengths, self.readout_table())
        vocabulary = self.config.readout_vocabulary
        if output.readout is not None and vocabulary is not None:
            output.readout[:] = [[vocabulary[i] for i in path] for path in output.readout]
        return output

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None, **_: Any
    ) -> BlspAudioOutput:
        """The vectors of all clips of (B, M, Tm) features, flat: `pooler_output` (N, D), `valid` (N,)."""
        if input_features_mask is None:
            raise ValueError("input_features without input_features_mask: BlspProcessor returns both")
        with torch.no_grad():
            states, lengths = encode_speech(
                self.audio_tower,
                input_features,
                input_features_mask.bool(),
                full_window=self.config.full_window,
            )
        heard = self.listen(states, lengths)
        inside = valid_mask(heard.num_audio_tokens, heard.vectors.shape[1])
        return BlspAudioOutput(
            last_hidden_state=states,
            pooler_output=heard.vectors[inside],
            valid=heard.valid[inside],
            adapter=heard,
        )

    def splice(
        self, input_ids: Tensor, audio: BlspAudioOutput | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, L, D) with the vectors in their places; mask (B, past + L) less invalid places."""
        places = input_ids == self.config.audio_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if audio is None or audio.pooler_output is None or audio.valid is None:
            if bool(places.any()):
                raise ValueError(
                    f"{int(places.sum())} audio placeholders in input_ids, but no input_features"
                )
            return embeds, attention_mask
        if int(places.sum()) != len(audio.pooler_output):
            raise ValueError(
                f"{int(places.sum())} audio placeholders in input_ids, but {len(audio.pooler_output)} "
                "vectors of speech: build both with the same BlspProcessor"
            )
        embeds = embeds.masked_scatter(places[:, :, None], audio.pooler_output.to(embeds.dtype))
        if audio.complete:
            return embeds, attention_mask
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        here = mask[:, -input_ids.shape[1] :]
        here[places] = here[places] * audio.valid.to(mask.dtype)
        return embeds, mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `BlspForConditionalGeneration.forward`."""
        if inputs_embeds is not None:
            return self._decode(
                inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, **kwargs
            )
        if input_ids is None:
            raise ValueError("give input_ids, or inputs_embeds")
        audio = None
        if input_features is not None:
            audio = self.get_audio_features(input_features, input_features_mask)
            if attention_mask is None:
                past = past_key_values.get_seq_length() if past_key_values is not None else 0
                attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        embeds, mask = self.splice(input_ids, audio, attention_mask)
        if mask is not None and mask.ndim == 2 and position_ids is None:
            position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        if mask is None or position_ids is None or audio is None or audio.complete:
            return self._decode(embeds, mask, position_ids, past_key_values, use_cache, **kwargs)
        embeds, mask, order = pack(embeds, mask)
        position_ids = position_ids.gather(1, order)
        outputs = self._decode(embeds, mask, position_ids, past_key_values, use_cache, **kwargs)
        return unpack(outputs, order)

    def _decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


def build_adapter(config: BlspConfig) -> nn.Module:
    """The adapter that a configuration names, freshly initialised."""
    if config.adapter not in ADAPTERS:
        raise ValueError(f"adapter {config.adapter!r}: must be one of {', '.join(ADAPTERS)}")
    options = dict(config.adapter_options or {})
    if config.adapter == "grounded":
        options["classes"] = len(config.readout_vocabulary or range(config.text_config.vocab_size))
    return ADAPTERS[config.adapter](config.audio_config.d_model, config.text_config.hidden_size, **options)


class BlspForConditionalGeneration(BlspPreTrainedModel, GenerationMixin):
    """`BlspModel` with the LLM's head."""

    def __init__(self, config: BlspConfig) -> None:
        super().__init__(config)
        self.model = BlspModel(config)
        text = config.text_config
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=head_has_bias(text))
        if config.tie_word_embeddings:
            table = self.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is table)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the adapter's tensors and the configuration; all tensors unless `config.adapter_only`."""
        if self.config.adapter_only:
            kwargs["state_dict"] = self.adapter_state()
        super().save_pretrained(save_directory, *args, **kwargs)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names they have in the whole model."""
        state = self.model.multi_modal_projector.state_dict()
        return {f"model.multi_modal_projector.{name}": tensor for name, tensor in state.items()}

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_decoder(self, *_: Any, **__: Any) -> nn.Module:
        return self.model.language_model

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor, **_: Any
    ) -> BlspAudioOutput:
        return self.model.get_audio_features(input_features, input_features_mask)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of the LLM's last hidden states (…, D)."""
        return scale_logits(self.config.text_config, self.lm_head(hidden))

    def listen(self, features: Sequence[Tensor], beam: int = 0) -> list[AudioEmbeds]:
        """What the LLM gets of each clip, from encoder states (T, E) a clip: invalid places taken out.

        beam: how many hypotheses of what was said to keep (`grounded` only).
        """
        device = self.get_input_embeddings().weight.device
        lengths = torch.tensor([len(states) for states in features], device=device)
        padded = nn.utils.rnn.pad_sequence([states.to(device) for states in features], batch_first=True)
        output = self.model.listen(padded, lengths)
        readout: Sequence[list[int] | None] = output.readout or [None] * len(features)
        return [
            AudioEmbeds(
                output.vectors[row][output.valid[row]],
                int(output.num_audio_tokens[row]),
                bool(output.speech[row]),
                readout[row],
                hypotheses_of(self.config, output, row, beam),
            )
            for row in range(len(features))
        ]

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        input_ids (B, L): text, with `config.audio_token_id` in each place of speech.
        input_features (clips, M, Tm), input_features_mask (clips, Tm): all clips of the batch, in order.
        labels (B, L): -100 where nothing is learnt (never at speech).
        logits_to_keep: 0 for all positions, n for the last n, or an index tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else logits_to_keep
        )
        hidden = outputs.last_hidden_state
        logits = self.compute_logits(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; speech is heard once, before the first token."""
        features = kwargs.pop("input_features", None)
        features_mask = kwargs.pop("input_features_mask", None)
        input_ids = kwargs.pop("input_ids", inputs)
        if features is not None:
            audio = self.get_audio_features(features, features_mask)
            given = kwargs.pop("attention_mask", None)
            embeds, mask = self.model.splice(input_ids, audio, given)
            mask = torch.ones_like(input_ids) if mask is None else mask
            kwargs["inputs_embeds"], kwargs["attention_mask"], _ = pack(embeds, mask)
        return super().generate(input_ids, **kwargs)
