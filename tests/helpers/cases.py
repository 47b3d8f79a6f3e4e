"""Worlds that tests run in: tiny models with random weights, token rows, a classifier, quadratics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from hf_fwdattr.models.likelihood import IGNORED, Objective


VOCABULARY = 23
CONTEXT = 16


def gpt2(dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """Conv1D everywhere, learned positions, embedding tied to the head."""
    settings = dict(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return finished(GPT2LMHeadModel(GPT2Config(**(settings | changes))), dtype)


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """Linear without bias, rotary positions, grouped heads, a head of its own."""
    torch.manual_seed(0)
    return finished(LlamaForCausalLM(LlamaConfig(**(_LLAMA_SIZES | changes))), dtype)


def qwen2(dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """As Llama, with biases on queries, keys and values, and the head tied to the embedding."""
    torch.manual_seed(0)
    return finished(Qwen2ForCausalLM(Qwen2Config(**(_LLAMA_SIZES | {"tie_word_embeddings": True} | changes))), dtype)


def qwen2_vl() -> PreTrainedModel:
    """A model of images and text, whose images are patches in one tensor."""
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(
        intermediate_size=16, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    vision = dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2, temporal_patch_size=1)
    settings = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=21, vision_start_token_id=20, vision_end_token_id=22
    )
    torch.manual_seed(0)
    return finished(Qwen2VLForConditionalGeneration(settings), torch.float32)


_LLAMA_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=CONTEXT,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=0,
    eos_token_id=0,
)
ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2}
# Llama's norms and rotary angles compute in float32 whatever the model's dtype, so float64 does not mean 1e-12 there.
DIGITS = {"gpt2": 1e-10, "llama": 2e-5, "qwen2": 2e-5}


def finished(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Evaluation mode, with norms and biases moved off their initial ones and zeros, where mistakes would hide."""
    generator = torch.Generator().manual_seed(1)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def adapted(model: PreTrainedModel, **changes: Any) -> PeftModel:
    """The model with LoRA on every projection, as after some training: neither A nor B is zero."""
    settings: dict[str, Any] = dict(r=2, lora_alpha=4, target_modules=projections(model))
    if isinstance(model, GPT2LMHeadModel):
        settings["fan_in_fan_out"] = True
    dtype = model.dtype
    peft_model = get_peft_model(model, LoraConfig(**(settings | changes))).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return peft_model.eval()


def projections(model: PreTrainedModel) -> list[str]:
    """Names of the projections that LoRA usually goes on."""
    if isinstance(model, GPT2LMHeadModel):
        return ["c_attn", "c_proj", "c_fc"]
    return ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


def token_rows(count: int = 5, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths (3 to 11 tokens), whose first tokens are a prompt and hence not supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 3 + (index * 5) % 9
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        prompt = index % 3
        rows.append({"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]})
    return rows


def padded(rows: Sequence[dict[str, list[int]]], length: int | None = None) -> dict[str, Tensor]:
    """A batch, padded on the right to `length` or to the longest row."""
    length = length or max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    full = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in full])
        for key, value in fill.items()
    }


@dataclass
class Classifier:
    """Rows (x, label) of a linear softmax classifier, float64; its Gauss-Newton matrix is its Hessian.

    `positions` > 1 makes a row several supervised positions, the first of which is not supervised in even rows.
    """

    rows: int = 12
    features: int = 3
    classes: int = 3
    positions: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.rows, self.positions, self.features, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, self.classes, (self.rows, self.positions), generator=generator)
        if self.positions > 1:
            labels[::2, 0] = IGNORED
        self.batch = {"x": x, "labels": labels}
        torch.manual_seed(self.seed)
        self.model = nn.Linear(self.features, self.classes).double().eval()
        self.objective = Objective("custom", lambda model, batch: (model(batch["x"]), batch["labels"]))

    @property
    def tokens(self) -> int:
        """n, supervised positions in all rows."""
        return int((self.batch["labels"] != IGNORED).sum())


@dataclass
class Quadratic:
    """Least squares with P parameters: l_i = (x_i theta - y_i)^2 / 2, and the objective is their mean; float64."""

    rows: int = 14
    size: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.x = torch.randn(self.rows, self.size, generator=generator, dtype=torch.float64)
        self.y = torch.randn(self.rows, generator=generator, dtype=torch.float64)
        self.diagonal = 0.3 + torch.rand(self.size, generator=generator, dtype=torch.float64)

    @property
    def hessian(self) -> Tensor:
        """(P, P) of the objective."""
        return self.x.T @ self.x / self.rows

    @property
    def factor(self) -> Tensor:
        """Z (rows, P) with Z^T Z the Hessian."""
        return self.x / self.rows**0.5

    def minimum(self, weight_decay: float = 0.0) -> Tensor:
        """Where D times the gradient and the decay balance."""
        decay = weight_decay * torch.diag(1.0 / self.diagonal)
        return torch.linalg.solve(self.hessian + decay, self.x.T @ self.y / self.rows)

    def gradients(self, theta: Tensor) -> Tensor:
        """(rows, P) of the rows' losses."""
        return self.x * (self.x @ theta - self.y)[:, None]

    def losses(self, theta: Tensor) -> Tensor:
        """(rows,)."""
        return (self.x @ theta - self.y).square() / 2
