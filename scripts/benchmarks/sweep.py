"""One case of the sweep: a tiny model of a class is trained in one way, and its scores are checked by conservation.

Under plain SGD with small steps the scores of all rows must sum to what the training changed: minus the gradient of a
query's loss, times the change of the tracked weights. The loss is the model's own, and its gradient plain autograd's,
so that nothing of the package is on that side. Where they differ, the derivative along the change is a central
difference of the loss: some models keep a part out of the gradient that moves nevertheless (DoRA's norm, the first
cycles of a recurrent model).
"""

import logging
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.errors import AttributionError
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.query.batch import batch_scores

from .tiny_models import CLASSES, PAD, VOCABULARY, tiny_model


__all__ = ["CASES", "TOLERANCE", "VERDICTS", "run_case"]

TOLERANCE = 0.01
VERDICTS = ("right", "refused", "wrong", "late", "crash", "untrainable", "not built")
_ROWS, _QUERIES, _SECONDS, _IGNORED = 8, 3, 120, -100
# Learning rates, the next where a score differs with one: a step may bend too much, or drown in float32's rounding.
_RATES = (2e-4, 1e-5, 2e-3, 2e-2, 0.1)
# Nats by which the most moved query's loss changes between the two sides of a difference, about. The others go as far:
# one that hardly moves would else be taken so far that experts change, and the difference is no derivative there.
_MOVE = 2e-4
_STEPS = 12  # differences from which a derivative is taken
_ATTENTION = (
    "q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "query_key_value", "c_attn", "qkv_proj", "Wqkv", "in_proj",
    "q", "v", "q_b_proj", "kv_b_proj", "query_proj", "value_proj", "W_pack", "qkv", "x_proj", "key_value", "c_proj",
)  # fmt: skip
_FEW = ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BertForSequenceClassification")
_MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM")
# What each case changes: LoRA settings, the tracked parameters, training arguments, and the side of the padding.
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"lora": {"use_dora": True}},
    "all-linear": {"lora": {"target_modules": "all-linear"}},
    "trained head": {"head": True, "parameters": "trainable"},
    "accumulation": {"arguments": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
    "left padding": {"left": True},
    # Further adapters, tried on a few classes.
    "prompt tuning": {"peft": "PromptTuningConfig", "parameters": "trainable", "classes": _FEW},
    "p-tuning": {"peft": "PromptEncoderConfig", "parameters": "trainable", "classes": _FEW},
    "prefix tuning": {"peft": "PrefixTuningConfig", "parameters": "trainable", "classes": _FEW},
    "prompt tuning, auto": {"peft": "PromptTuningConfig", "classes": _FEW},
    "LoRA on experts": {"experts": True, "parameters": "lora", "classes": _MIXTURES},
    "router loss": {"router": True, "classes": _MIXTURES},
}


def run_case(kind: str, name: str, case: str) -> dict[str, Any]:
    """Return what became of a case: its verdict, the relative error of the sum of scores, and the message.

    Args:
        kind (`str`): `causal` or `classifier`.
        name (`str`): of the class.
        case (`str`): one of `CASES`.

    Returns:
        `verdict` is `right` (to 1 %), `refused` before the first step, `wrong`, `late` (an error after the first
        step), `crash` (a foreign error before it), or `untrainable`: the class cannot be trained so at all.
    """
    started = time.time()
    result = {"class": name, "kind": kind, "case": case, "transformers": transformers.__version__}
    with _quiet(), _time_limit(_SECONDS), tempfile.TemporaryDirectory() as folder:
        try:
            outcome: dict[str, Any] = {}
            for rate in _RATES:
                last = _outcome(kind, name, CASES[case] | {"rate": rate}, Path(folder))
                if last["verdict"] != "wrong" or last["error"] < outcome.get("error", float("inf")):
                    outcome = last
                if last["verdict"] != "wrong":
                    break
        except Exception as error:
            outcome = _described("not built", error)
    return result | outcome | {"s": round(time.time() - started, 2)}


def _outcome(kind: str, name: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    made = lambda: _adapted(kind, tiny_model(kind, name), case)  # noqa: E731
    model = made()
    spec = case.get("parameters", "auto")
    callback = ResponseCallback(
        ResponseConfig(parameters=spec, directions="exact", segments=1, quiet=True, batch_size=4, curvature_samples=8)
    )
    trainer = _trainer(kind, name, model, case, folder, [callback])
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    try:
        trainer.train()
        bank = callback.bank
    except Exception as error:
        late, ours = trainer.state.global_step > 0, isinstance(error, AttributionError)
        if ours and not late and error.__cause__ is None:
            return _described("refused", error)
        try:
            _trainer(kind, name, made(), case, folder, []).train()
        except Exception as plain:
            return _described("untrainable", plain)
        return _described("late" if late else "refused" if ours else "crash", error)
    if bank is None:
        return {"verdict": "late", "message": "no bank"}
    model.eval()
    query = _collate(kind, name, _rows(kind, _QUERIES, seed=5, length=7), left=False)
    try:
        scores = batch_scores(model, bank, query).double().sum(1)
    except Exception as error:
        return _described("late", error)
    for by_difference in (False, True):
        expected = _expected(model, bank.check_model(model), before, query, kind, by_difference)
        size = float(expected.norm())
        error = float((scores - expected).norm()) / size if size else float(bool(scores.any()))
        if error <= TOLERANCE:
            break
    return {
        "verdict": "right" if error <= TOLERANCE else "wrong",
        "error": round(error, 5),
        "size": float(f"{size:.3g}"),
    }


def _expected(
    model: nn.Module,
    parameters: TrackedParameters,
    before: dict[str, Tensor],
    query: dict[str, Tensor],
    kind: str,
    by_difference: bool,
) -> Tensor:
    """Return what training added to each query's log-likelihood, to first order, (queries,), nats."""
    live = dict(model.named_parameters())
    moved = [live[name] for name in parameters.live]
    changes = [(live[name].detach() - before[name]).double() for name in parameters.live]
    singles = [{key: value[row : row + 1] for key, value in query.items()} for row in range(_QUERIES)]
    # The first label is masked, so that a loss counts the same tokens whether or not it shifts labels.
    tokens = [1 if kind == "classifier" else int((one["labels"] != _IGNORED).sum()) for one in singles]
    derivatives = []
    for single, count in zip(singles, tokens, strict=True):
        with _requiring_gradients(moved):
            gradients = torch.autograd.grad(model(**single).loss * count, moved, allow_unused=True)
        pairs = [(c, g.double()) for c, g in zip(changes, gradients, strict=True) if g is not None]
        derivatives.append(sum(float((change * gradient).sum()) for change, gradient in pairs))
    if by_difference:
        factor = _MOVE / max(1e-9, *(abs(derivative) for derivative in derivatives))
        derivatives = [
            _slope(model, single, moved, changes, factor) * count
            for single, count in zip(singles, tokens, strict=True)
        ]
    return -torch.tensor(derivatives, dtype=torch.float64)


def _slope(
    model: nn.Module, single: dict[str, Tensor], moved: list[nn.Parameter], changes: list[Tensor], factor: float
) -> float:
    """Return the slope of the loss along the changes, by least squares through differences at steps up to 2 `factor`.

    One small step would be rounding, and a large one may make a router choose other experts.
    """
    factors = [factor * 2 * step / _STEPS for step in range(1, _STEPS + 1)]
    found = [_difference(model, single, moved, changes, each) for each in factors]
    squares = [each * each for each in factors]
    return sum(s * value for s, value in zip(squares, found, strict=True)) / sum(squares)


@torch.no_grad()
def _difference(
    model: nn.Module, single: dict[str, Tensor], moved: list[nn.Parameter], changes: list[Tensor], factor: float
) -> float:
    """Return the central difference of the loss along the changes, `factor` times as far on either side."""
    losses, kept = [], [tensor.clone() for tensor in moved]
    for sign in (1, -1):
        for tensor, old, change in zip(moved, kept, changes, strict=True):
            tensor.copy_(old.double() + sign * factor * change)
        losses.append(float(model(**single).loss))
    for tensor, old in zip(moved, kept, strict=True):
        tensor.copy_(old)
    return (losses[0] - losses[1]) / (2 * factor)


@contextmanager
def _requiring_gradients(tensors: list[nn.Parameter]) -> Iterator[None]:
    flags = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)


def _adapted(kind: str, model: Any, case: dict[str, Any]) -> nn.Module:
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    targets: Any = [name for name in _ATTENTION if name in leaves][:6] or "all-linear"
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": targets}
    if kind == "causal" and case.get("head"):
        head = model.get_output_embeddings()
        settings["modules_to_save"] = [name.rpartition(".")[2] for name, one in model.named_modules() if one is head]
    if case.get("experts"):
        names = [name for name, one in model.named_parameters() if one.ndim == 3 and "expert" in name]
        settings |= {"target_modules": [], "target_parameters": names}
    if case.get("router"):
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.2
    task = "SEQ_CLS" if kind == "classifier" else "CAUSAL_LM"
    if "peft" in case:
        return get_peft_model(model, getattr(peft, case["peft"])(task_type=task, num_virtual_tokens=3))
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(task_type=task, **(settings | case.get("lora", {}))))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _trainer(
    kind: str, name: str, model: nn.Module, case: dict[str, Any], folder: Path, callbacks: list[TrainerCallback]
) -> Trainer:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=case["rate"],
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", logging_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=3, remove_unused_columns=False,
    )  # fmt: skip
    left = bool(case.get("left"))
    trainer = Trainer(
        model=model, args=TrainingArguments(**(settings | case.get("arguments", {}))),
        train_dataset=_rows(kind, _ROWS),
        data_collator=lambda rows: _collate(kind, name, rows, left), callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _rows(kind: str, count: int, seed: int = 0, length: int | None = None) -> Any:
    """Return token rows of 4 to 8 tokens that end with an end of text; labels of a first token are masked."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        tokens = torch.randint(3, VOCABULARY - 4, ((length or 4 + index * 3 % 5) - 1,), generator=generator).tolist()
        labels: Any = index % CLASSES if kind == "classifier" else [_IGNORED, *tokens[1:], 2]
        rows.append({"input_ids": [*tokens, 2], "labels": labels})
    return rows


def _collate(kind: str, name: str, rows: list[dict[str, Any]], left: bool) -> dict[str, Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        more = [fill] * (length - len(values))
        return more + values if left else values + more

    batch = {
        "inputs" if "Perceiver" in name else "input_ids": [padded(row["input_ids"], PAD) for row in rows],
        "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in rows],
        "labels": [row["labels"] if kind == "classifier" else padded(row["labels"], _IGNORED) for row in rows],
    }
    return {key: torch.tensor(value) for key, value in batch.items()}


def _described(verdict: str, error: Exception) -> dict[str, Any]:
    text = " ".join(str(error).split())[:500]
    return {
        "verdict": verdict,
        "message": text if isinstance(error, AttributionError) else f"{type(error).__name__}: {text}",
    }


@contextmanager
def _quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"{seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
