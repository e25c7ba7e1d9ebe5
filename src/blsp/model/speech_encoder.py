"""The frozen Whisper encoder, run on the true length of the speech, with a mask.

In:  16 kHz mono float32 arrays; a `WhisperFeatureExtractor`; a `WhisperEncoder`.
Out: encoder states (B, T, E) at 50 frames/s, and how many frames of each row are valid.
Try: `states, lengths = encode_speech(tower, *mel_features(extractor, [audio]))`
Flow: audio → **mel → encoder states** → adapter.

Whisper was trained on windows of 30 s, and the paper pads every clip to 30 s (`full_window`). By default, padding is
masked in the attention, and set to zero again after the first convolution: its bias would otherwise reach the last
speech frame through the second convolution. Speech longer than 30 s is cut into windows, whose states are joined.

Shapes: B batch, M mel bins, Tm mel frames (100/s), T encoder frames (50/s), E encoder width, W windows.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blsp.llm.language_model import valid_mask

FRAMES_PER_SECOND = 50  # of the encoder's states
HOP_SAMPLES = 160  # one mel frame each 10 ms at 16 kHz
WINDOW_MEL_FRAMES = 3000  # 30 s: as many positions as Whisper's encoder has, times two
WINDOWS_AT_A_TIME = 8  # of a long recording: an hour needs no more memory than four minutes
MULTILINGUAL_TOKENS = 51_865  # of Whisper's multilingual models; the others have one less
FEATURES_VERSION = "mel-1"  # enters the feature cache's key: raise it when the numbers change


def knows_english_only(config: WhisperConfig) -> bool:
    """Whether the encoder is from an English-only Whisper model, judged by the size of its vocabulary."""
    return config.vocab_size < MULTILINGUAL_TOKENS


def mel_frames(samples: int) -> int:
    """Mel frames of a clip of `samples` 16 kHz samples: one for each started 10 ms, at least two."""
    return max(2, -(-samples // HOP_SAMPLES))


def encoder_frames(mel: int) -> int:
    """Encoder frames of `mel` mel frames: the encoder's second convolution halves them, rounding up."""
    return -(-mel // 2)


def batches_by_length(lengths: Sequence[int], budget: float) -> Iterator[list[int]]:
    """Indices of clips in batches of similar length: number of clips times the longest length is at most `budget`.

    A clip that is longer than the budget is a batch alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Lengths increase, so the batch would be padded to lengths[i].
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def mel_features(
    extractor: WhisperFeatureExtractor, audios: Sequence[np.ndarray], *, full_window: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-mel features of each clip on its true length, right-padded with zeros.

    The spectrum is computed with silence after each clip, so up to the end of the speech the frames equal those of
    Whisper's own 30 s input. With `full_window` each window is filled up to 30 s, and only the mask has the true
    length.

    Returns: features (B, M, Tm) float32 and mask (B, Tm) bool.
    """
    frames = [mel_frames(len(audio)) for audio in audios]
    longest = max(frames)
    if full_window:
        longest = -(-longest // WINDOW_MEL_FRAMES) * WINDOW_MEL_FRAMES
    features = torch.zeros(len(audios), extractor.feature_size, longest)
    for row, (audio, count) in enumerate(zip(audios, frames, strict=True)):
        kept = longest if full_window else count
        features[row, :, :kept] = torch.from_numpy(_log_mel(extractor, audio, kept))
    mask = valid_mask(torch.tensor(frames), longest)
    return features, mask


def _log_mel(extractor: WhisperFeatureExtractor, audio: np.ndarray, frames: int) -> np.ndarray:
    """(M, frames) log-mel of one clip followed by silence."""
    silence_frames = -(-extractor.n_fft // HOP_SAMPLES)
    output = extractor(
        np.asarray(audio, dtype=np.float32),
        sampling_rate=extractor.sampling_rate,
        max_length=(frames + silence_frames) * HOP_SAMPLES,
        padding="max_length",
        truncation=False,
        return_tensors="np",
    )
    return output["input_features"][0, :, :frames]


def encode_speech(
    tower: WhisperEncoder, input_features: Tensor, mask: Tensor, *, full_window: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the encoder on features (B, M, Tm); mask (B, Tm) is True for valid frames, which come first.

    With `full_window` the features must be whole windows of `mel_features(…, full_window=True)`: the encoder
    attends to the silence after the speech, and zeros are not the mel features of silence. Gradients are kept only
    where the encoder has trainable weights.

    Returns: states (B, T, E), zero where invalid, and lengths (B,) in encoder frames.
    """
    mel_lengths = mask.sum(dim=1)
    width = input_features.shape[2]
    if full_window and width % WINDOW_MEL_FRAMES:
        raise ValueError(f"full_window needs a multiple of {WINDOW_MEL_FRAMES} mel frames (30 s), not {width}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
        if width <= WINDOW_MEL_FRAMES:
            return _encode_window(tower, input_features, mel_lengths, full_window)
        return _encode_windows(tower, input_features, mel_lengths, full_window)


def _encode_windows(
    tower: WhisperEncoder, input_features: Tensor, mel_lengths: Tensor, full_window: bool
) -> tuple[Tensor, Tensor]:
    """States of more than 30 s: those of its windows, joined."""
    width = input_features.shape[2]
    # windows of 30 s become rows of a batch; those without speech are left out
    count = -(-width // WINDOW_MEL_FRAMES)
    padded = nn.functional.pad(input_features, (0, count * WINDOW_MEL_FRAMES - width))
    windows = padded.unflatten(2, (count, WINDOW_MEL_FRAMES)).transpose(1, 2).flatten(0, 1)  # (B*W, M, 3000)
    starts = torch.arange(count, device=mel_lengths.device) * WINDOW_MEL_FRAMES
    window_lengths = (mel_lengths[:, None] - starts).clamp(0, WINDOW_MEL_FRAMES).flatten()  # (B*W,)
    frames, conv = encoder_frames(WINDOW_MEL_FRAMES), tower.conv1
    joined = windows.new_zeros(len(windows), frames, conv.out_channels, dtype=conv.weight.dtype)
    for some in window_lengths.nonzero().flatten().split(WINDOWS_AT_A_TIME):
        states, _ = _encode_window(tower, windows[some], window_lengths[some], full_window)
        joined[some, : states.shape[1]] = states
    lengths = (mel_lengths + 1) // 2
    return joined.unflatten(0, (-1, count)).flatten(1, 2)[:, : int(lengths.max())], lengths


def _encode_window(
    tower: WhisperEncoder, features: Tensor, mel_lengths: Tensor, full_window: bool
) -> tuple[Tensor, Tensor]:
    """States of at most 30 s: `WhisperEncoder.forward` in parts, since the whole accepts 3000 frames only."""
    lengths = (mel_lengths + 1) // 2
    features = features.to(tower.conv1.weight.dtype)
    attended = torch.full_like(mel_lengths, features.shape[2]) if full_window else mel_lengths
    mel_mask = valid_mask(attended, features.shape[2])[:, None, :]  # (B, 1, Tm)
    hidden = nn.functional.gelu(tower.conv1(features * mel_mask)) * mel_mask
    hidden = nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)  # (B, T, E)
    hidden = hidden + tower.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
    valid = valid_mask((attended + 1) // 2, hidden.shape[1])  # (B, T)
    attention_mask = create_bidirectional_mask(tower.config, hidden, valid)  # in the form that its attention needs
    for layer in tower.layers:
        hidden = layer(hidden, attention_mask)
    hidden = tower.layer_norm(hidden)[:, : int(lengths.max())]
    return hidden * valid_mask(lengths, hidden.shape[1])[:, :, None], lengths
