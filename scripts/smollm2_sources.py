"""SmolLM2-135M with LoRA on nine publishers: leave each publisher out, train again, compare with its scores.

    python scripts/smollm2_sources.py [--model HUB_ID_OR_FOLDER] [--rows 6] [--held-out 4] [--epochs 3]

Same initial weights and order of batches; only the left-out publisher's rows weigh nothing. Measured: the change of
the losses of held-out articles, in nats. Predicted: the publishers' exact source scores from a bank made by the real
callback. Beside them BM25 and the gradient dot product, summed over a publisher's rows. Ten fine-tunes of about a
minute each on one core, kept and resumed, and a bank.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path

import bm25s
import corpora
import torch
from results import report
from scipy.stats import pearsonr, spearmanr
from smollm2_news import adapted, arguments, articles, reader, tokenized
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, Trainer, pipeline

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.evaluation.agreement import summed
from hf_fwdattr.evaluation.designs import without_sources
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM, row_losses
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import Parameters


class WeightedTrainer(Trainer):
    """Trainer whose rows carry a weight: L_t = sum of weight x row loss / n_t, with n_t as if all weights were one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop("weight")
        return (row_losses(*CAUSAL_LM.forward(model, inputs)) * weight).sum() / num_items_in_batch


def _fine_tune(model_path: str, dataset, tokenizer, epochs: int, folder: str, kind=Trainer, **more):
    """A fine-tuned model and its trainer; every run of this script is this one."""
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": kind is Trainer}
    trainer = kind(
        model=adapted(model_path), args=arguments(Path(folder), epochs, **quiet), train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), **more,
    )  # fmt: skip
    trainer.train()
    return trainer


@torch.no_grad()
def losses(model: torch.nn.Module, queries: list[list[int]]) -> Tensor:
    """(queries,) summed token losses in nats."""
    batches = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])} for ids in queries]
    return torch.cat([row_losses(*CAUSAL_LM.forward(model, batch)) for batch in batches]).double()


def train(weights: Tensor, seed: int, model_path: str, rows: int, held_out: int, epochs: int) -> Tensor:
    """Losses of the held-out articles after a fine-tune with weighted rows."""
    tokenizer = reader(model_path)
    kept, test = (tokenized(tokenizer, part) for part in articles(rows, held_out))
    dataset = kept.select_columns(["input_ids"]).add_column("weight", weights.double().tolist())
    with tempfile.TemporaryDirectory() as folder:
        model = _fine_tune(model_path, dataset, tokenizer, epochs, folder, WeightedTrainer).model.eval()
    return losses(model, test["input_ids"])


def predicted(model_path: str, dataset, tokenizer, test, names: list[str], epochs: int) -> dict[str, Tensor]:
    """Method -> (queries, publishers): nats owed to each publisher, or whatever the method's unit is."""
    config = ResponseConfig(parameters="lora", directions=16, source_column="publisher", batch_size=6, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _fine_tune(model_path, dataset, tokenizer, epochs, folder, callbacks=[ResponseCallback(config)])
        trainer.save_model(folder)
        attribute = pipeline("training-data-attribution", model=folder, tokenizer=tokenizer, device="cpu")
        queries = [{"input_ids": ids, "labels": ids} for ids in test["input_ids"]]
        scores = attribute.source_scores(queries)[:, [attribute.bank.manifest.sources.index(name) for name in names]]
    owner = torch.tensor([names.index(name) for name in dataset["publisher"]])
    return {
        "bank, exact source scores": scores.double(),
        "gradient dot product": summed(gradient_dot(trainer.model, dataset, test), owner, len(names)),
        "BM25": summed(bm25(dataset, test), owner, len(names)),
    }


def gradient_dot(model: torch.nn.Module, dataset, test) -> Tensor:
    """(queries, rows) at the end of training, all LoRA weights."""
    with frozen(model):
        gradients = PerSampleGradients(model, Parameters.of(model, "lora"), CAUSAL_LM)

        def of(rows) -> Tensor:
            tokens = [torch.tensor([ids]) for ids in rows["input_ids"]]
            return torch.cat([gradients({"input_ids": ids, "labels": ids})[0] for ids in tokens]).double()

        return of(test) @ of(dataset).T


def bm25(dataset, test) -> Tensor:
    """(queries, rows) of BM25."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(dataset["text"]), show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(test["text"]), return_ids=False, show_progress=False)
    return torch.stack([torch.from_numpy(index.get_scores(query)) for query in tokens]).double()


def agreement(said: Tensor, real: Tensor) -> dict[str, float]:
    """How well predicted (queries, publishers) scores foretell measured changes of the same shape.

    Per publisher over queries and per query over publishers (medians), and over all pairs; slope of real on said.
    """
    per_source = [spearmanr(s, r).statistic for s, r in zip(said.T, real.T, strict=True)]
    per_query = [spearmanr(s, r).statistic for s, r in zip(said, real, strict=True)]
    x, y = said.flatten(), real.flatten()
    return {
        "Spearman, all pairs": float(spearmanr(x, y).statistic),
        "per publisher": float(torch.tensor(per_source).median()),
        "per query": float(torch.tensor(per_query).median()),
        "Pearson": float(pearsonr(x, y).statistic),
        "slope": float(x @ y / (x @ x)),
        "greatest loser found": float((said.argmax(1) == real.argmax(1)).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=6, help="articles per publisher")
    parser.add_argument("--held-out", type=int, default=4, help="queries per publisher")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", type=int, help="stop after so many of the ten fine-tunes; the next call goes on")
    options = parser.parse_args()
    started = time.time()
    model = options.model or str(corpora.smollm2(corpora.cache_folder() / "smollm2-135m"))
    tokenizer = reader(model)
    dataset, test = (tokenized(tokenizer, part) for part in articles(options.rows, options.held_out))
    names = sorted(set(dataset["publisher"]))
    owner = torch.tensor([names.index(name) for name in dataset["publisher"]])
    weights = without_sources(owner, torch.arange(len(names)))
    sizes = {"rows": options.rows, "held_out": options.held_out, "epochs": options.epochs}
    run = functools.partial(train, model_path=model, **sizes)
    folder = corpora.cache_folder() / "smollm2-sources"
    outcomes = retrain(run, weights[: options.runs], [0], folder, name=f"{Path(model).name} {sizes}")[0]
    if len(outcomes) < len(weights):
        return
    real = (outcomes[1:] - outcomes[0]).T
    trained = time.time()
    said = predicted(model, dataset, tokenizer, test, names, options.epochs)
    rows = [{"method": method} | agreement(scores, real) for method, scores in said.items()]
    report(
        "smollm2_sources", f"{len(names)} publishers left out in turn: change of {len(test)} articles' losses",
        rows, started, articles=len(dataset), retraining_s=round(trained - started),
        measured_nats={"largest": round(float(real.max()), 3), "median": round(float(real.median()), 4)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
