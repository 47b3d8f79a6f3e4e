"""What a model's architecture, adapter or padding makes impossible is refused before the first step."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForCausalLM, PhimoeConfig, PhimoeForCausalLM, PreTrainedModel

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.jvp.analytic import AnalyticJVP
from hf_fwdattr.jvp.backend import Backend
from hf_fwdattr.jvp.finite_difference import FiniteDifferenceJVP
from hf_fwdattr.models.likelihood import CAUSAL_LM, UNSHIFTED_CAUSAL_LM, resolve_objective
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.models.positions import context_length
from hf_fwdattr.trainer.columns import row_ids_of
from hf_fwdattr.trainer.recorder import ResponseRecorder
from tests.helpers.cases import IGNORED, VOCABULARY, adapted, finished, gpt2, llama, padded, token_rows
from tests.helpers.runs import config


def left_padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    batch = padded([{key: values[::-1] for key, values in row.items()} for row in rows])
    return {key: value.flip(1) for key, value in batch.items()}


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, d_model=12, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return finished(BartForCausalLM(BartConfig(**sizes)), torch.float32)


def record(model: Any, collate: Any) -> ResponseRecorder:
    rows = [row | {"labels": [IGNORED, *row["labels"][1:]]} for row in token_rows(8)]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return ResponseRecorder(
        config(source_column=None), accelerator=None, model=model, optimizer=torch.optim.SGD(trained, lr=1e-3),
        dataloader=loader, steps=2,
    )  # fmt: skip


def test_left_padding_with_learned_positions_is_refused_before_the_first_step() -> None:
    with pytest.raises(UnsupportedError, match=r"differs from its gradient alone.*padding_side='right'"):
        record(adapted(gpt2(torch.float32)), left_padded)


@pytest.mark.parametrize(("model", "collate"), [(llama, left_padded), (llama, padded), (gpt2, padded)])
def test_padding_that_moves_no_gradient_is_accepted(model: Any, collate: Any) -> None:
    adapter = adapted(model(torch.float32))
    state = torch.get_rng_state()
    record(adapter, collate).detach()
    assert torch.equal(state, torch.get_rng_state())
    assert any(parameter.requires_grad for parameter in adapter.parameters())


def test_the_objective_follows_a_loss_that_does_not_shift_labels() -> None:
    assert resolve_objective(bart()) is UNSHIFTED_CAUSAL_LM
    assert resolve_objective(gpt2()) is resolve_objective(llama()) is CAUSAL_LM


def test_dora_is_read_by_differences_and_refused_for_jvp() -> None:
    model = adapted(llama(torch.float32), use_dora=True)
    parameters = TrackedParameters.of(model, "lora")
    batch = padded(token_rows(2))
    with pytest.raises(UnsupportedError, match="not a plain LoRA layer"):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    assert isinstance(Backend(model, parameters).prepare(batch), FiniteDifferenceJVP)
    with pytest.raises(UnsupportedError, match=r"DoRA.*readout='difference'"):
        Backend(model, parameters, "jvp").prepare(batch)


def test_a_router_that_samples_experts_while_training_is_refused() -> None:
    """PhiMoE draws experts at random within its jitter noise; without noise, and with dropout, all is as queried."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=16, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, attention_dropout=0.5,
    )  # fmt: skip
    changes: dict[str, Any] = dict(target_modules=["q_proj"], lora_dropout=0.5)
    noisy = finished(PhimoeForCausalLM(PhimoeConfig(**sizes, router_jitter_noise=1.0)), torch.float32)
    with pytest.raises(UnsupportedError, match=r"PhimoeForCausalLM: in training mode its logits differ by"):
        record(adapted(noisy, **changes), padded)
    still = finished(
        PhimoeForCausalLM(PhimoeConfig(**sizes, router_jitter_noise=0.0, input_jitter_noise=0.0)), torch.float32
    )
    adapter = adapted(still, **changes).train()
    record(adapter, padded).detach()
    dropouts = [module.p for module in adapter.modules() if isinstance(module, torch.nn.Dropout)]
    assert 0.5 in dropouts
    assert still.config.attention_dropout == still.model.layers[0].self_attn.attention_dropout == 0.5
    assert all(module.training for module in adapter.modules())


def test_only_learned_positions_limit_a_row() -> None:
    assert context_length(llama()) is None
    assert context_length(gpt2()) == 16
    assert context_length(adapted(gpt2())) == 16


def test_row_ids_may_be_numbers_of_torch_and_need_no_end_of_iteration() -> None:
    class Endless:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"number": torch.tensor(index % 3 + 7)}

    assert row_ids_of(Endless(), "number", 3).tolist() == [7, 8, 9]
