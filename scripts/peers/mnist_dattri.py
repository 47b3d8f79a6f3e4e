"""TRAK, TracIn, EK-FAC and CG influence of the MNIST networks with dattri 0.3.0, in its own environment.

    python scripts/mnist_mlp.py --hand-out FOLDER        # the networks and digits, as plain tensors
    .venvs/dattri/bin/python scripts/peers/mnist_dattri.py FOLDER [METHOD ...]
    python scripts/mnist_mlp.py --peers FOLDER           # judges what this wrote

Settings are those of dattri's own MNIST benchmark (TRAK: 512 dimensions; CG: 10 iterations, regularisation 1e-2);
its TRAK attributes to networks trained on halves, here they are the networks that everybody attributes to. A method
that was done is not done again. CG solves one linear system per query, so it answers the first 25 queries only.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


CG_QUERIES = 25


def network(widths):
    """784-128-64-10 without dropout, as it is in evaluation."""
    layers = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def state(model, theta):
    """Named weights of a flat vector."""
    named = dict(model.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape).clone() for (name, p), part in zip(named.items(), parts, strict=True)}


def loader(images, labels, size=250):
    return DataLoader(TensorDataset(images, labels), batch_size=size, shuffle=False)


class Peer:
    """The methods, each from the opened folder to (queries, rows), larger where the row helps."""

    def __init__(self, folder):
        self.given = torch.load(Path(folder) / "given.pt", weights_only=True)
        self.model = network(self.given["widths"].tolist())
        self.states = [state(self.model, theta) for theta in self.given["ends"]]
        self.rows = loader(self.given["images"], self.given["labels"])
        self.queries = loader(self.given["query_images"], self.given["query_labels"])

    def loss(self, single):
        """Cross-entropy, as dattri calls it: of one row, or of a batch."""

        def function(parameters, data):
            image, label = (part.unsqueeze(0) for part in data) if single else data
            logits = torch.func.functional_call(self.model, parameters, (image,))
            return nn.functional.cross_entropy(logits, label.long())

        return function

    def trak(self, count):
        plain = self.loss(single=True)

        def odds(parameters, data):
            log_p = -plain(parameters, data)
            return log_p - torch.log(1 - torch.exp(log_p))

        def chance(parameters, data):
            return torch.exp(-plain(parameters, data))

        task = AttributionTask(loss_func=odds, model=self.model, checkpoints=self.states[:count])
        attributor = TRAKAttributor(task, chance, projector_kwargs={"proj_dim": 512, "device": "cpu"}, device="cpu")
        attributor.cache(self.rows)
        return attributor.attribute(self.queries).T

    def tracin(self, count):
        task = AttributionTask(loss_func=self.loss(single=True), model=self.model, checkpoints=self.states[:count])
        attributor = TracInAttributor(task, weight_list=torch.ones(count) * 1e-3, normalized_grad=False, device="cpu")
        return attributor.attribute(self.rows, self.queries).T

    def ekfac(self):
        task = AttributionTask(loss_func=self.loss(single=False), model=self.model, checkpoints=self.states[0])
        attributor = IFAttributorEKFAC(task, module_name=["0", "2", "4"])
        attributor.cache(self.rows)
        return attributor.attribute(self.rows, self.queries).T

    def cg(self):
        task = AttributionTask(loss_func=self.loss(single=False), model=self.model, checkpoints=self.states[0])
        attributor = IFAttributorCG(task, max_iter=10, regularization=1e-2, device="cpu")
        attributor.cache(loader(self.given["images"], self.given["labels"], len(self.given["labels"])))
        few = loader(self.given["query_images"][:CG_QUERIES], self.given["query_labels"][:CG_QUERIES], 1)
        return attributor.attribute(self.rows, few).T


def main():
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    peer = Peer(folder)
    most = len(peer.states)
    methods = {
        "dattri TRAK, 1 network": (1, lambda: peer.trak(1)),
        "dattri gradient dot, 1 network": (1, lambda: peer.tracin(1)),
        "dattri EK-FAC, 1 network": (1, peer.ekfac),
        "dattri CG, 1 network, 25 queries": (1, peer.cg),
        f"dattri TRAK, {most} networks": (most, lambda: peer.trak(most)),
        f"dattri TracIn, {most} networks": (most, lambda: peer.tracin(most)),
    }
    chosen = sys.argv[2:] or list(methods)
    for name in chosen:
        path = folder / f"{name}.pt"
        if path.exists():
            continue
        count, run = methods[name]
        began = time.process_time()
        try:
            scores = run().detach().float()
        except Exception as error:  # what cannot be run is said, with the error
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        seconds = torch.tensor(time.process_time() - began)
        torch.save({"scores": scores, "networks": torch.tensor(count), "seconds": seconds}, path)
        print(f"{name}: {tuple(scores.shape)}, {float(seconds):.1f} s of processor", flush=True)


if __name__ == "__main__":
    main()
