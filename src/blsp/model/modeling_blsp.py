"""The model: a frozen Whisper encoder, the adapter and a frozen LLM, under Hugging Face's conventions.

In:  `input_ids` with a placeholder for every audio token, and the speech's log-mel features and mask.
Out: the LLM's outputs; `generate` works as for any transformers model.
Try: `BlspForConditionalGeneration.from_pretrained("models/blsp-tiny")`
Flow: processor → **audio_tower → multi_modal_projector → language_model** → text.

A checkpoint folder holds only the adapter; `from_pretrained` loads the frozen parts that its configuration names and
checks their digests (loading.py). The adapter's vectors replace the placeholders in the LLM's input. If an adapter
gives fewer vectors than there are placeholders, the rest is masked, and positions count only unmasked columns:

    input_ids      say   <|audio|> <|audio|> <|audio|> <|audio|>  again
    embeddings     say   vector    vector    0         0          again
    mask           1     1         1         0         0          1
    position_ids   0     1         2         2         2          3

Shapes: B batch, M mel bins, Tm mel frames, T encoder frames, S audio tokens, N audio tokens of all clips,
L sequence, E encoder width, D LLM width, V vocabulary, K read-out classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging

from blsp.llm.language_model import (
    UnsupportedModelError,
    at_least_float32,
    check_supported,
    head_has_bias,
    scale_logits,
    valid_mask,
)
from blsp.model.adapter import build_adapter, check_loaded, mean_embeddings, readout_rows
from blsp.model.adapter_parts import AdapterOutput, AudioEmbeds, CachedValue
from blsp.model.configuration_blsp import BlspConfig, CheckpointError, is_adapter_folder
from blsp.model.hypotheses import hypotheses_of
from blsp.model.speech_encoder import encode_speech
from blsp.model.splicing import masked, pack, splice, unpack
from blsp.model.weight_samples import ADAPTER, LORA, changed_weight

logger = logging.get_logger(__name__)


@dataclass
class BlspAudioOutput(BaseModelOutputWithPooling):
    """`pooler_output` (N, D): one row for each audio token of all clips; `valid` (N,): which rows are vectors."""

    valid: Tensor | None = None
    adapter: AdapterOutput | None = None

    @property
    def complete(self) -> bool:
        """Whether every audio token has a vector."""
        return self.valid is None or bool(self.valid.all())


class BlspPreTrainedModel(PreTrainedModel):
    """Settings of both classes for transformers."""

    config_class = BlspConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)
    # the adapter stays in float32, as in an adapter folder, and is not quantised
    _keep_in_fp32_modules = (ADAPTER,)
    _keep_in_fp32_modules_strict = (ADAPTER,)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: the adapter's constructor initialises it, the frozen parts come from files."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter folder (with the frozen parts it names, digests checked) or a merged export.

        Raises CheckpointError if a tensor is missing; none is left at a random value.
        """
        with_info = kwargs.pop("output_loading_info", False)
        if is_adapter_folder(pretrained_model_name_or_path):
            try:
                from blsp.model.loading import load_adapter_folder
            except ImportError as error:  # this file was copied into a merged model
                raise CheckpointError("an adapter alone is loaded by the package blsp: pip install blsp") from error
            whole = load_adapter_folder(BlspForConditionalGeneration, pretrained_model_name_or_path, **kwargs)
            model: Any = whole.model if issubclass(cls, BlspModel) else whole
            info: dict[str, Any] = {"missing_keys": set()}
        else:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            check_loaded(pretrained_model_name_or_path, model, info["missing_keys"])
        return (model, info) if with_info else model


class BlspModel(BlspPreTrainedModel):
    """Encoder, adapter and the LLM without its head."""

    def __init__(self, config: BlspConfig) -> None:
        super().__init__(config)
        check_supported(config.text_config)
        if config.audio_config.model_type != "whisper":
            raise UnsupportedModelError(f"{config.audio_config.model_type}: the speech encoder must be a Whisper")
        self.audio_tower = WhisperEncoder(config.audio_config)
        self.multi_modal_projector = build_adapter(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._table, self._ids, self._whole, self._moments = (CachedValue() for _ in range(4))
        # each of these must stay on one device, as its parts are called one by one; the LLM names its own layers
        self._no_split_modules = (WhisperEncoder.__name__, type(self.multi_modal_projector).__name__)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @property
    def reads_out(self) -> bool:
        """Whether the adapter gives a transcript (a read-out)."""
        return self.multi_modal_projector.reads_out

    @property
    def readout_vocabulary(self) -> list[tuple[int, ...]] | None:
        """The LLM's tokens of each row of the read-out table; None: the LLM's vocabulary, token i in row i."""
        vocabulary = getattr(self.multi_modal_projector, "vocabulary", None)
        return None if vocabulary is None else self._ids.get(readout_rows, vocabulary)

    def readout_row(self) -> dict[int, int]:
        """LLM token -> its row of the read-out table. Rows of several tokens are left out."""
        rows = self.readout_vocabulary or [(token,) for token in range(self.config.text_config.vocab_size)]
        return {tokens[0]: row for row, tokens in enumerate(rows) if len(tokens) == 1}

    def readout_table(self) -> Tensor | None:
        """(K-1, D): the LLM's embedding of each row's token, or the mean of its tokens; None without a read-out."""
        if not self.reads_out:
            return None
        embedding, vocabulary = self.get_input_embeddings(), getattr(self.multi_modal_projector, "vocabulary", None)
        if vocabulary is not None:
            return self._table.get(lambda _, ids: mean_embeddings(embedding, ids), embedding.weight, vocabulary)
        return self.embedding_table()

    def embedding_table(self) -> Tensor:
        """(V, D): the LLM's input embedding of each token."""
        embedding = self.get_input_embeddings()
        if type(embedding) is nn.Embedding:
            return embedding.weight
        every = range(self.config.text_config.vocab_size)  # Gemma 3 multiplies its embeddings by a factor
        return self._whole.get(lambda weight: embedding(torch.tensor(every, device=weight.device)), embedding.weight)

    def embedding_moments(self) -> tuple[Tensor, float]:
        """Mean (D,) of the LLM's token embeddings, and their variance around it, per component."""
        return self._moments.get(_moments, self.embedding_table())

    def listen(self, states: Tensor, lengths: Tensor) -> AdapterOutput:
        """The adapter's output for encoder states (B, T, E) with lengths (B,); its read-out as the LLM's token ids."""
        weight = next(self.multi_modal_projector.parameters())
        output = self.multi_modal_projector(states.to(weight), lengths.to(weight.device), self.readout_table())
        vocabulary = self.readout_vocabulary
        if output.readout is not None and vocabulary is not None:
            output.readout[:] = [[token for i in path for token in vocabulary[i]] for path in output.readout]
        return output

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None, **_: Any
    ) -> BlspAudioOutput:
        """The vectors of all clips of (B, M, Tm) features, flat: `pooler_output` (N, D), `valid` (N,)."""
        if input_features_mask is None:
            raise ValueError("input_features without input_features_mask: BlspProcessor returns both")
        tower, device = self.audio_tower, self.audio_tower.conv1.weight.device
        input_features, mask = input_features.to(device), input_features_mask.to(device).bool()
        states, lengths = encode_speech(tower, input_features, mask, full_window=self.config.full_window)
        output = self.listen(states, lengths)
        inside = valid_mask(output.num_audio_tokens, output.vectors.shape[1])  # (B, S)
        return BlspAudioOutput(
            last_hidden_state=states, pooler_output=output.vectors[inside], valid=output.valid[inside], adapter=output
        )

    def splice(
        self, input_ids: Tensor, audio: BlspAudioOutput | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, L, D) with the vectors instead of the placeholders, and the mask (B, past + L)."""
        is_audio = input_ids == self.config.audio_token_id  # (B, L)
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        if audio is None or audio.pooler_output is None or audio.valid is None:
            if bool(is_audio.any()):
                raise ValueError(f"{int(is_audio.sum())} audio placeholders in input_ids, but no input_features")
            return embeds, attention_mask
        embeds = splice(embeds, is_audio, audio.pooler_output)
        return embeds, attention_mask if audio.complete else masked(attention_mask, is_audio, audio.valid)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `BlspForConditionalGeneration.forward`; other arguments are passed on to the LLM."""
        kwargs["past_key_values"] = past_key_values
        if inputs_embeds is not None:
            kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
            return self.language_model(inputs_embeds=inputs_embeds, **kwargs)
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
            kwargs |= {"attention_mask": mask, "position_ids": position_ids}
            return self.language_model(inputs_embeds=embeds, **kwargs)
        embeds, mask, order = pack(embeds, mask)
        kwargs |= {"attention_mask": mask, "position_ids": position_ids.gather(1, order)}
        return unpack(self.language_model(inputs_embeds=embeds, **kwargs), order)


def _moments(table: Tensor) -> tuple[Tensor, float]:
    table = at_least_float32(table.detach())  # (V, D)
    mean = table.mean(dim=0)
    return mean, (table - mean).square().mean().item()


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
        self.frozen_sample: dict[str, Tensor] = {}  # of the frozen parts when they were loaded (weight_samples.py)
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the adapter's tensors and the configuration; all tensors unless `config.adapter_only`.

        All tensors are also written if a frozen one was changed after loading, as by a LoRA merged into the LLM.
        """
        adapter_only = self.config.adapter_only
        if adapter_only and not getattr(self, "_hf_peft_config_loaded", False):  # transformers then saves the LoRA
            changed = changed_weight(self, self.frozen_sample)
            if changed is None:
                kwargs["state_dict"] = self.adapter_state()
            else:
                logger.warning(f"{changed} was changed after loading: the whole model is written to {save_directory}")
                self.config.adapter_only = False
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.adapter_only = adapter_only

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors, and those of LoRA, under the names they have in the whole model."""
        state = self.model.multi_modal_projector.state_dict(prefix="model.multi_modal_projector.")
        return {**state, **{name: p.detach() for name, p in self.named_parameters() if LORA in name}}

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

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor, **_: Any) -> BlspAudioOutput:
        return self.model.get_audio_features(input_features, input_features_mask)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of the LLM's last hidden states (…, D)."""
        return scale_logits(self.config.text_config, self.lm_head(hidden))

    def listen(self, features: Sequence[Tensor], beam: int = 0) -> list[AudioEmbeds]:
        """The valid vectors of each clip, from its encoder states (T, E).

        beam: how many possible transcripts to return with them, if the adapter reads out.
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
                hypotheses_of(output, row, beam, self.model.readout_vocabulary),
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
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        input_ids (B, L): text, with `config.audio_token_id` for each audio token.
        input_features (clips, M, Tm), input_features_mask (clips, Tm): all clips of the batch, in order.
        labels (B, L): -100 at positions without a loss; always -100 for audio tokens.
        logits_to_keep: 0 for all positions, n for the last n, or an index tensor.
        num_items_in_batch: divisor of the summed loss; None: the number of labels of this pass.
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.compute_logits(outputs.last_hidden_state[:, kept])  # (B, kept, V)
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=size, num_items_in_batch=num_items_in_batch
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
        """transformers' `generate`; the speech is encoded once, before the first token."""
        features = kwargs.pop("input_features", None)
        refuse_drafts(features, kwargs, self.generation_config)
        features_mask = kwargs.pop("input_features_mask", None)
        input_ids = kwargs.pop("input_ids", inputs)
        if features is not None:
            audio = self.get_audio_features(features, features_mask)
            given = kwargs.pop("attention_mask", None)
            embeds, mask = self.model.splice(input_ids, audio, given)
            mask = torch.ones_like(input_ids) if mask is None else mask
            kwargs["inputs_embeds"], kwargs["attention_mask"], _ = pack(embeds, mask)
        return super().generate(input_ids, **kwargs)


def refuse_drafts(features: Tensor | None, kwargs: dict[str, Any], default: Any) -> None:
    """Raise ValueError for decoding methods that draft from `input_ids`, where speech has only placeholders."""
    if features is None:
        return
    config = kwargs.get("generation_config") or default
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if kwargs.get(name) is not None or getattr(config, name, None) is not None:
            raise ValueError(f"{name}: drafts are taken from the ids of the prompt, and speech has none; leave it out")
