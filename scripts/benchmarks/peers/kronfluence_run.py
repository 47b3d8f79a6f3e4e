"""EK-FAC influence with kronfluence, in its own environment: python peers/kronfluence_run.py FOLDER."""

import sys
import tempfile

import torch
from exchange import Exchange, Result, hand_in, seconds, token_losses
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch.utils.data import Dataset


class Tokens(Dataset):
    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class LanguageModelling(Task):
    """The task of the library's own wikitext example, restricted to the adapter's modules."""

    def __init__(self, modules):
        self.modules = modules

    def compute_train_loss(self, batch, model, sample=False):
        if not sample:
            return token_losses(model, batch["input_ids"], batch["labels"]).sum()
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].reshape(-1, model.config.vocab_size)
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            labels[batch["labels"][:, 1:].flatten() == -100] = -100
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.modules


def main():
    exchange = Exchange(sys.argv[1], sys.argv[2:])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = exchange.model()
    modules = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".lora_" in n]
    task = LanguageModelling(modules)
    model = prepare_model(model, task)
    loading = DataLoaderKwargs(num_workers=0)
    with tempfile.TemporaryDirectory() as scratch:
        analyzer = Analyzer("lora", model, task, cpu=True, output_dir=scratch, disable_tqdm=True)
        analyzer.set_dataloader_kwargs(loading)
        rows, queries = Tokens(exchange.rows, exchange.row_labels), Tokens(exchange.queries, exchange.query_labels)
        spent = []

        def fit():
            if not spent:
                began = seconds()
                analyzer.fit_all_factors("ekfac", rows, per_device_batch_size=16,
                                         factor_args=FactorArguments(strategy="ekfac"))  # fmt: skip
                spent.append(seconds() - began)
            return spent[0]

        def scores(damping):
            built, began = fit(), seconds()
            name = f"scores-{damping}"
            analyzer.compute_pairwise_scores(
                scores_name=name, factors_name="ekfac", query_dataset=queries, train_dataset=rows,
                per_device_query_batch_size=8, per_device_train_batch_size=16,
                score_args=ScoreArguments(damping_factor=damping),
            )  # fmt: skip
            asked = seconds() - began
            return Result(analyzer.load_pairwise_scores(name)["all_modules"], built, asked, 0.0)

        for damping in (1e-8, 1.0, None, 1e-1, 1e1):
            setting = "a tenth of the mean eigenvalue" if damping is None else f"damping {damping:g}"
            hand_in(exchange, f"kronfluence-ekfac-{damping}", lambda d=damping: scores(d), peer="kronfluence 1.0.1",
                    method="EK-FAC", setting=setting, shipped=damping == 1e-8, backward="query and rows")  # fmt: skip


if __name__ == "__main__":
    main()
