"""Real fine-tunes of tiny models: a word-level tokenizer, a training set with sources, the Trainer, the callback."""

from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import hf_fwdattr.pipeline
from hf_fwdattr import ResponseCallback, ResponseConfig, TrainingDataAttributionPipeline
from hf_fwdattr.models.likelihood import CAUSAL_LM, Objective, row_losses
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import CONTEXT, VOCABULARY, adapted, gpt2, padded, token_rows
from tests.helpers.reference import row_gradient


ROWS = 12
SOURCES = ["north", "east", "south", "east", "north", None, "east"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `w1` to `w22` and the end, with a chat template."""
    vocabulary = {"<end>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<end>")
    result.model_max_length = CONTEXT
    result.chat_template = TEMPLATE
    return result


def training_set(count: int = ROWS) -> Dataset:
    """Rows of different lengths with a source (none for one in seven), a row id, and a column that is not used."""
    rows: list[dict[str, Any]] = token_rows(count, seed=1)
    return Dataset.from_list(
        [
            row | {"source": SOURCES[i % 7], "number": 100 - i, "text": " ".join(f"w{t}" for t in row["input_ids"])}
            for i, row in enumerate(rows)
        ]
    )


def queries(count: int = 4) -> list[dict[str, list[int]]]:
    """Token rows that are in no training set."""
    return token_rows(count, seed=9)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Four optimizer steps an epoch, three epochs, nothing reported."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=3, num_train_epochs=3, learning_rate=1e-2, seed=3,
        save_strategy="no", report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return TrainingArguments(**(settings | changes))


def config(**changes: Any) -> ResponseConfig:
    """Exact, quiet, with sources."""
    settings: dict[str, Any] = dict(directions="exact", quiet=True, source_column="source", batch_size=4)
    return ResponseConfig(**(settings | changes))


class ShardedTrainer(Trainer):
    """A Trainer that does FSDP2 on CPUs. Accelerate can, but takes the plugin for GPUs only, and silently trains by
    DDP; here its state is changed once it exists.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        self.is_fsdp_enabled = True


def trainer_for(
    folder: Path, model: Any, dataset: Any, callback: ResponseCallback | None, collate: Any = padded, **changes: Any
) -> Trainer:
    """A Trainer with the callback, if any."""
    callbacks = [] if callback is None else [callback]
    more = {name: changes.pop(name) for name in ("optimizers", "compute_loss_func", "eval_dataset") if name in changes}
    kind = ShardedTrainer if "fsdp" in changes else Trainer
    return kind(
        model=model, args=arguments(folder, **changes), train_dataset=dataset, data_collator=collate,
        callbacks=callbacks, processing_class=tokenizer(), **more,
    )  # fmt: skip


def fine_tune(
    folder: Path, model: Any, settings: ResponseConfig | None = None, dataset: Any = None, **changes: Any
) -> ResponseCallback:
    """Train, and return the callback with its bank."""
    callback = ResponseCallback(settings or config())
    trainer_for(folder, model, training_set() if dataset is None else dataset, callback, **changes).train()
    return callback


def base(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """GPT-2 without dropout, so that the gradients of training are those of evaluation."""
    return gpt2(dtype, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def saved_base(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A base model loaded from disk, as adapters need it."""
    model = base(dtype)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


def saved_adapter(folder: Path, settings: ResponseConfig | None = None, **changes: Any) -> PeftModel:
    """A fine-tuned adapter in `folder` with its bank and tokenizer, on a base saved beside it."""
    model = adapted(saved_base(folder.parent / f"{folder.name}-base"))
    tokenizer().save_pretrained(folder.parent / f"{folder.name}-base")  # where transformers looks for an adapter's
    fine_tune(folder, model, settings, **changes)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def ask(model: Any, bank: Any, **changes: Any) -> TrainingDataAttributionPipeline:
    """The pipeline on a live model."""
    return pipeline(hf_fwdattr.pipeline.TASK, model=model, tokenizer=tokenizer(), bank=bank, device="cpu", **changes)


def oracle(model: Any, bank: Any, some: list[dict[str, list[int]]], objective: Objective = CAUSAL_LM) -> Tensor:
    """Return (queries, rows): minus the query's gradient, by reverse mode, times the responses in the bank."""
    model.eval()
    parameters = bank.check_model(model)
    directions = bank.directions(torch.float64)[: bank.manifest.directions]
    responses = torch.cat([block.double() for _, _, block in bank.coordinates()]) @ directions
    gradients = [row_gradient(model, parameters, objective, padded([query])) for query in some]
    return -torch.stack(gradients).double() @ responses.T


def losses(model: Any, rows: list[Any], objective: Objective = CAUSAL_LM, collate: Any = padded) -> Tensor:
    """Loss of every row, (rows,): minus its log-likelihood, in nats."""
    with torch.no_grad():
        return torch.cat([row_losses(*objective.forward(model.eval(), collate([row]))) for row in rows])


def weights(model: Any, spec: str = "trainable") -> Tensor:
    """theta, flat."""
    return TrackedParameters.of(model, spec).read(model)
