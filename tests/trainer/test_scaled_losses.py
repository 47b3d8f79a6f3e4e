"""Clipping and label smoothing are part of the weight of a row's loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from hf_fwdattr import ResponseCallback
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM, row_losses
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.trainer.clipping import ClippingRecorder
from hf_fwdattr.trainer.patching import Patches
from hf_fwdattr.trainer.row_weights import MicroBatch, OptimizerStep
from tests.helpers.cases import adapted, padded, token_rows
from tests.helpers.reference import agree
from tests.helpers.runs import ask, base, config, fine_tune, queries, trainer_for, training_set, weights


def test_clipped_step_counts_as_a_step_of_smaller_rate(tmp_path: Path) -> None:
    """SGD with clipping, and SGD whose schedule takes the same steps: one training, one bank."""
    model = adapted(base())
    clipped = fine_tune(tmp_path / "a", model, optim="sgd", learning_rate=0.1, max_grad_norm=0.2,
                        lr_scheduler_type="constant")  # fmt: skip
    clips = clipped.recorder.record.clips
    assert max(clips) < 1
    assert len(set(clips)) == len(clips)
    other, callback = adapted(base()), ResponseCallback(config())
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*clips, 1.0][step])
    trainer_for(
        tmp_path / "b", other, training_set(), callback, optimizers=(optimizer, schedule), max_grad_norm=0
    ).train()
    assert callback.recorder.record.clips == [1.0] * 12
    agree(weights(other), weights(model), 1e-6)
    agree(ask(other, callback.bank).scores(queries()), ask(model, clipped.bank).scores(queries()), 1e-5)


def test_clipping_factor_is_read_where_accelerate_clips() -> None:
    class Accelerator:
        def clip_grad_norm_(self, parameters: Any, max_norm: float) -> torch.Tensor:
            return nn.utils.clip_grad_norm_(parameters, max_norm)

        def clip_grad_value_(self, parameters: Any, value: float) -> None: ...

    def with_gradients() -> list[nn.Parameter]:
        for parameter in mine:
            parameter.grad = torch.full((2,), 2.0)
        return mine

    mine, others = [nn.Parameter(torch.ones(2)) for _ in range(2)], [nn.Parameter(torch.ones(2))]
    accelerator = Accelerator()
    patches = Patches()
    clipping = ClippingRecorder(accelerator, mine, patches)
    assert clipping.take() == 1.0
    assert accelerator.clip_grad_norm_(with_gradients(), 1.0) == pytest.approx(4.0)
    accelerator.clip_grad_norm_(mine, 0.5)
    assert float(clipping.take()) == pytest.approx(1 / 8, rel=1e-4)
    accelerator.clip_grad_norm_(with_gradients() + others, 100.0)
    accelerator.clip_grad_norm_(iter(others), 0.1)
    assert float(clipping.take()) == 1.0
    with pytest.raises(UnsupportedError, match="clipped apart"):
        accelerator.clip_grad_norm_(mine[:1], 1.0)
    with pytest.raises(UnsupportedError, match="clip_grad_value_"):
        accelerator.clip_grad_value_(mine, 1.0)
    patches.undo()
    assert not vars(accelerator)


def test_smoothed_row_losses_match_label_smoother() -> None:
    model, batch = base(), padded(token_rows(5))
    with torch.no_grad():
        logits, labels = CAUSAL_LM.forward(model, batch)
        smoother = LabelSmoother(epsilon=0.3)
        expected = smoother({"logits": logits}, labels, num_items_in_batch=1)
    agree(row_losses(logits, labels, 0.3).sum(), expected, 1e-6)
    assert torch.equal(row_losses(logits, labels, 0.0), row_losses(logits, labels))


@pytest.mark.parametrize("spec", ["lora_B", "trainable"])
def test_smoothed_per_sample_gradients_match_autograd(spec: str) -> None:
    model, batch = adapted(base()), padded(token_rows(4))
    parameters = TrackedParameters.of(model, spec)
    live = parameters.tensors(model)
    logits, labels = CAUSAL_LM.forward(model, batch)
    plain = torch.autograd.grad(row_losses(logits, labels, 0.2).sum(), live)
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, CAUSAL_LM)(batch, smoothing=0.2)
    agree(gradients.sum(0), torch.cat([g.reshape(-1) for g in plain]), 1e-5)


def test_label_smoothing_is_in_record_and_bank(tmp_path: Path) -> None:
    model = adapted(base())
    callback = fine_tune(tmp_path, model, label_smoothing_factor=0.4)
    assert callback.bank is not None
    assert callback.bank.manifest.run.label_smoothing == 0.4
    assert callback.recorder.record.smoothing == 0.4


def test_losses_of_unknown_or_unequal_weight_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="is not told num_items_in_batch"):
        OptimizerStep(0.1, [MicroBatch(torch.arange(2))]).finalize(1, 1.0)
    micro = MicroBatch(torch.arange(2))
    micro.record_token_gradients(torch.tensor([[-0.5, -0.25]]))
    with pytest.raises(UnsupportedError, match="weighs some tokens more"):
        OptimizerStep(0.1, [micro]).finalize(1, None)
    micro.record_token_gradients(torch.zeros(1, 0))  # a micro-batch without supervised tokens
    assert OptimizerStep(0.1, [micro]).finalize(1, None)[2].tolist() == [0.0, 0.0]


def test_bitsandbytes_layers_on_a_cpu_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """The CPU kernels of bitsandbytes 0.50 gave gradients, forward and backward, that were all zero."""
    model = adapted(base())
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.add_module("q_proj", kind(2, 2))
    with pytest.raises(UnsupportedError, match="q_proj is a Linear4bit of bitsandbytes on a CPU"):
        fine_tune(tmp_path, model)
