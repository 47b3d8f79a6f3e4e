"""TRAK, EK-FAC, LoGra and DVEmb with dattri, in its own environment: python peers/dattri_run.py FOLDER."""

import os
import sys
import tempfile

import torch
from dattri.algorithm.dvemb import DVEmbAttributor
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.algorithm.logra import LoGraAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from exchange import Exchange, Result, hand_in, seconds, token_losses
from torch.utils.data import DataLoader, TensorDataset


PEER = "dattri 0.3.0"


def loader(tokens, size=16):
    return DataLoader(TensorDataset(tokens), batch_size=size, shuffle=False)


def named(tokens, labels, size=16):
    """Return a loader of dictionaries, which the library's hooks take."""
    both = [{"input_ids": row, "labels": own} for row, own in zip(tokens, labels, strict=True)]
    return DataLoader(both, batch_size=size, shuffle=False)


def functional(model, parameters, tokens):
    """Return log-probabilities (rows, length - 1) with these parameters."""
    logits = torch.func.functional_call(model, parameters, (), {"input_ids": tokens}).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


def trak(exchange, models, dimension, ridge):
    """Score by TRAK as in the library's examples: log odds, summed over tokens, as loss and as target."""
    model = exchange.model(0, only_adapter=True)
    states = [exchange.model(i, only_adapter=True).state_dict() for i in range(models)]

    def log_odds(parameters, data):
        log_p = functional(model, parameters, data[0].unsqueeze(0) if data[0].ndim == 1 else data[0])
        return (log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))).sum()

    def probability(parameters, data):
        return functional(model, parameters, data[0].unsqueeze(0)).exp().mean()

    task = AttributionTask(loss_func=log_odds, model=model, checkpoints=states)
    attributor = TRAKAttributor(task, probability, projector_kwargs={"proj_dim": dimension}, regularization=ridge)
    began = seconds()
    attributor.cache(loader(exchange.rows))
    built = seconds()
    scores = attributor.attribute(loader(exchange.queries, 8)).T
    return Result(scores, built - began, seconds() - built, 4 * models * dimension)


class EKFAC:
    """EK-FAC with factors that are fitted once; each damping by the library's own attribute method."""

    def __init__(self, exchange):
        self.exchange, self.built = exchange, None

    def fit(self):
        if self.built is None:
            model = self.exchange.model(0, only_adapter=True)
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            modules = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".lora_" in n]

            def loss(parameters, data):  # the mean over the batch, as its documentation asks
                tokens = data[0].unsqueeze(0) if data[0].ndim == 1 else data[0]
                return -functional(model, parameters, tokens).sum(1).mean()

            task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
            began = seconds()
            self.attributor = IFAttributorEKFAC(task, module_name=modules)
            self.attributor.cache(loader(self.exchange.rows))
            self.built = seconds() - began

    def scores(self, damping):
        self.fit()
        self.attributor.damping = damping
        began = seconds()
        scores = self.attributor.attribute(loader(self.exchange.rows), loader(self.exchange.queries, 8)).T
        return Result(scores, self.built, seconds() - began, 0.0)


def logra(exchange, dimension, damping):
    """Score by block-wise projected gradients with an empirical Fisher matrix for each module."""
    model = exchange.model(0, only_adapter=True)
    modules = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".lora_" in n]

    def loss(model, batch, device):
        return token_losses(model, batch["input_ids"].to(device), batch["labels"].to(device)).sum()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # it writes its metadata where it stands
        try:
            attributor = LoGraAttributor(task, layer_names=modules, proj_dim=dimension, damping=damping, offload="cpu")
            began = seconds()
            rows = named(exchange.rows, exchange.row_labels)
            queries = named(exchange.queries, exchange.query_labels, 8)
            attributor.cache(rows)
            built = seconds()
            scores = attributor.attribute(rows, queries).T
        finally:
            os.chdir(before)
    return Result(scores, built - began, seconds() - built, 4.0 * attributor.total_proj_dim)


def dvemb(exchange, dimension, factor):
    """Score along the recorded run. DVEmb knows SGD only; `factor` stands for Adam's preconditioner."""
    model, run = exchange.model(0, only_adapter=True), exchange.run()
    parameters = [p for n, p in model.named_parameters()]

    def loss(params, data):
        tokens = data[0].unsqueeze(0) if data[0].ndim == 1 else data[0]
        return -functional(model, params, tokens).sum(1).mean()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = DVEmbAttributor(task, proj_dim=dimension)
    final = [p.detach().clone() for p in parameters]

    def place(values):
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    began = seconds()
    steps = len(run["rates"])
    for step in range(steps):
        pieces = run["theta"][step].split([p.numel() for p in parameters])
        place([piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)])
        indices = run["rows"][step]
        # The losses are sums over tokens and the run's was a mean over tokens: hence the row's length in the rate.
        rate = factor * float(run["rates"][step]) / (exchange.rows.shape[1] - 1)
        attributor.cache_gradients(step * 3 // steps, (exchange.rows[indices],), indices, rate)
    attributor.cache()
    built = seconds()
    place(final)
    scores = attributor.attribute(loader(exchange.queries, 8)).T
    width = dimension or sum(p.numel() for p in parameters)
    return Result(scores, built - began, seconds() - built, 4.0 * width)


def main():
    exchange = Exchange(sys.argv[1], sys.argv[2:])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for models, dimension, ridge in ((1, 512, 0.0), (1, 2048, 0.0), (1, 2048, 1e1), (1, 2048, 1e3), (5, 2048, 1e3)):
        hand_in(
            exchange, f"dattri-trak-{models}-{dimension}-{ridge:g}",
            lambda m=models, d=dimension, r=ridge: trak(exchange, m, d, r), peer=PEER, method="TRAK",
            setting=f"{dimension} dimensions, ridge {ridge:g}", shipped=(dimension, ridge) == (512, 0.0),
            backward="query", models=models,
        )  # fmt: skip
    tried = ((4096, None), (1024, None), (1024, 1.0), (1024, 1e1), (4096, 1.0), (4096, 1e1), (4096, 1e2))
    for dimension, damping in tried:
        mean = "1e-5" if damping is None else f"{damping:g}"
        hand_in(exchange, f"dattri-logra-{dimension}-{damping}", lambda n=dimension, d=damping: logra(exchange, n, d),
                peer=PEER, method="LoGra", setting=f"{dimension} dimensions a module, damping {mean} of the mean",
                shipped=(dimension, damping) == (4096, None), backward="query")  # fmt: skip
    for dimension, factor in ((1024, 1.0), (1024, 1e2), (1024, 1e3), (1024, 1e4), (256, 1.0), (4096, 1.0)):
        hand_in(exchange, f"dattri-dvemb-{dimension}-{factor:g}", lambda n=dimension, f=factor: dvemb(exchange, n, f),
                peer=PEER, method="DVEmb", setting=f"{dimension} dimensions, learning rate x {factor:g}",
                shipped=(dimension, factor) == (1024, 1), backward="query")  # fmt: skip
    ekfac = EKFAC(exchange)
    for damping in (0.0, 1.0, 1e-2, 1e2):
        hand_in(exchange, f"dattri-ekfac-{damping:g}", lambda d=damping: ekfac.scores(d), peer=PEER, method="EK-FAC",
                setting=f"damping {damping:g}", shipped=damping == 0, backward="query and rows")  # fmt: skip


if __name__ == "__main__":
    main()
