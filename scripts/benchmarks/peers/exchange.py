"""The exchange with other libraries: one folder of safetensors and JSON that any environment can read.

    base/                 the base model, as transformers saves it
    adapters/0 ... 4/     fine-tuned adapters, as peft saves them; 0 is the one that is attributed
    tokens.safetensors    rows (rows, length) and queries (queries, length): token ids, all of them supervised unless
                          there are row_labels and query_labels of the same shapes, -100 where a token is not
    run.safetensors       adapter 0's training: theta (steps, P), rows (steps, batch), rates (steps,)
    scores/NAME.safetensors, NAME.json    scores of a method: see `hand_in`

Nothing here knows hf_fwdattr: the peers' own environments import this file.
"""

import gc
import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


MINUTES = 15  # of wall time that a method may take


def seconds() -> float:
    """Return the processor time of this process and its finished children: other work does not count."""
    return sum(os.times()[:4])


@dataclass
class Exchange:
    """An exchange folder; with names in `only`, no other method is run."""

    folder: Path
    only: Sequence[str] = ()

    def __post_init__(self):
        self.folder = Path(self.folder)
        tokens = load_file(self.folder / "tokens.safetensors")
        self.rows, self.queries = tokens["rows"], tokens["queries"]
        self.row_labels = tokens.get("row_labels", self.rows)
        self.query_labels = tokens.get("query_labels", self.queries)

    def model(self, adapter: int = 0, only_adapter: bool = False) -> torch.nn.Module:
        """Return the fine-tuned PeftModel in evaluation mode.

        With `only_adapter` the base weights are buffers, so that `named_parameters` are the LoRA matrices and nothing
        else: for libraries that attribute to every parameter they find.
        """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.folder / "base", attn_implementation="eager")
        base.config.pad_token_id = None  # transformers would look for it among the tokens, which vmap does not allow
        model = PeftModel.from_pretrained(base, str(self.folder / "adapters" / str(adapter)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if only_adapter:
            for module in model.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and not parameter.requires_grad:
                        del module._parameters[name]
                        module.register_buffer(name, parameter.detach())
        return model.eval()

    def run(self) -> dict[str, torch.Tensor]:
        """Return the training of adapter 0."""
        return load_file(self.folder / "run.safetensors")


def token_losses(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return negative log-likelihoods (rows, length - 1) in nats, 0 where a label is -100; padding is on the right."""
    logits = model(input_ids=tokens).logits[:, :-1]
    wanted = (tokens if labels is None else labels)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")


@dataclass
class Result:
    """Scores of a method, and their cost.

    Attributes:
        scores (`Tensor`): (queries, rows); higher means that the row makes the query likelier.
        build_s (`float`, *optional*): seconds of processor time before any query is known; None: in `query_s`.
        query_s (`float`): the same for all queries together.
        row_bytes (`float`): stored per row.
    """

    scores: torch.Tensor
    build_s: float | None
    query_s: float
    row_bytes: float


def hand_in(
    exchange: Exchange, name: str, run: Callable[[], Result], *, peer: str, method: str, setting: str, backward: str,
    shipped: bool = False, models: int = 1,
) -> None:  # fmt: skip
    """Run a method and write its scores, or the error that it ended in, which may be that it was not done in time.

    A method whose record exists is not run again.

    Args:
        name (`str`): of the files.
        setting (`str`): of the method, in a few words.
        shipped (`bool`): the setting is the library's own, untuned.
        backward (`str`): backward passes of a query: `none`, `query` (one backward of the query), `query and rows`.
        models (`int`): fine-tunes that it needs.
    """
    folder = exchange.folder / "scores"
    folder.mkdir(exist_ok=True)
    record = {"peer": peer, "method": method, "setting": setting, "shipped": shipped, "backward": backward,
              "models": models, "error": None}  # fmt: skip
    if (folder / f"{name}.json").exists() or (exchange.only and name not in exchange.only):
        return
    began = seconds()
    try:
        with in_time():
            result = run()
        scores = result.scores.detach().float().contiguous()
        wanted = (len(exchange.queries), len(exchange.rows))
        if tuple(scores.shape) != wanted:
            raise ValueError(f"scores of shape {tuple(scores.shape)}, not (queries, rows) = {wanted}")
        record |= {"build_s": result.build_s, "query_s": result.query_s, "row_bytes": result.row_bytes}
        save_file({"scores": scores}, folder / f"{name}.safetensors")
    except Exception as error:
        traceback.print_exc()
        record["error"] = _without_paths(f"{type(error).__name__}: {error}")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    gc.collect()
    print(f"{name}: {record['error'] or 'done'} ({seconds() - began:.0f} s)", flush=True)


@contextmanager
def in_time() -> Iterator[None]:
    """Limit the time of the code inside to so many minutes.

    Raises:
        TimeoutError: it was not done by then.
    """

    def late(*_) -> None:
        raise TimeoutError(f"not done after {MINUTES} minutes on one core")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60 * MINUTES)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _without_paths(message: str) -> str:
    """Return an error's first lines without the folders of this machine."""
    return re.sub(r"(/[\w.@+-]+){2,}/", ".../", " ".join(message.split()))[:300]
