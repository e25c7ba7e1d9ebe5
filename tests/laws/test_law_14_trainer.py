"""Law 14: transformers' own Trainer with accumulation has the loss and the gradient of one large batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import speech_like
from transformers import Trainer, TrainerCallback, TrainingArguments

from blsp.model.configuration_blsp import AUDIO_TOKEN

TEXTS = ["say{} one", "say{} one and two and three and four", "{} five", "please{} six, seven"]
CLIPS = [speech_like(0.4 + 0.3 * seed, seed) for seed in range(4)]


class Gradients(TrainerCallback):
    """Keeps what the optimiser is about to be given."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trained = model.model.multi_modal_projector.named_parameters()
        self.kept = {name: parameter.grad.clone() for name, parameter in trained}


def one_step(pair: Any, out: Path, batch: int, accumulation: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss that the Trainer logs and the gradient of its only step, over the same four rows."""
    model, processor = pair

    def collate(rows: list[dict[str, int]]) -> dict[str, Any]:
        numbers = [row["row"] for row in rows]
        texts, clips = [TEXTS[row].format(AUDIO_TOKEN) for row in numbers], [CLIPS[row] for row in numbers]
        inputs = dict(processor(text=texts, audio=clips, sampling_rate=16000))
        is_audio = inputs["input_ids"] == model.config.audio_token_id
        answer = is_audio.cumsum(dim=1) == is_audio.sum(dim=1, keepdim=True)  # the last audio token and what follows
        return inputs | {"labels": inputs["input_ids"].masked_fill(~answer | is_audio, -100)}

    gradients = Gradients()
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,  # neither clipped nor measured
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"row": row} for row in range(len(TEXTS))]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[gradients])
    loss = trainer.train().training_loss
    model.eval()
    model.zero_grad()
    return loss, gradients.kept


@pytest.mark.parametrize("adapter", ["conv", "grounded"])
def test_accumulation_is_one_large_batch(pair_of, tmp_path: Path, adapter: str) -> None:
    whole = one_step(pair_of(adapter), tmp_path, batch=4, accumulation=1)
    for batch, accumulation in ((1, 4), (2, 2)):
        loss, gradient = one_step(pair_of(adapter), tmp_path, batch, accumulation)
        assert loss == pytest.approx(whole[0], rel=1e-6)  # transformers' loss is in float32
        largest = max(float(tensor.abs().max()) for tensor in whole[1].values())
        for name, tensor in gradient.items():
            torch.testing.assert_close(tensor, whole[1][name], rtol=0, atol=1e-6 * largest)
