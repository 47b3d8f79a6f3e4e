"""TRAK, TracIn, EK-FAC and CG influence of the MNIST networks with dattri 0.3.0, in its own environment.

    python scripts/mnist_mlp.py --hand-out FOLDER        # the networks and digits, as plain tensors
    .venvs/dattri/bin/python scripts/peers/mnist_dattri.py FOLDER [METHOD ...]
    python scripts/mnist_mlp.py --peers FOLDER           # judges what this wrote

Settings are those of dattri's own MNIST benchmark (TRAK: 512 dimensions; CG: 10 iterations, regularisation 1e-2), for
EK-FAC the library's default damping of 0 and five others. Its benchmark's TRAK attributes to networks trained on
halves, here they are the networks that everybody attributes to. A method that was done is not done again, and TRAK,
which goes from network to network, goes on where it was stopped. CG solves one linear system per query, so it answers
the first 25 queries only. What fails is kept with its error.
"""

import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from exchange import in_time
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


CG_QUERIES = 25
TRAK_COUNTS = (1, 5, 10, 50)  # networks after which TRAK's scores are kept
DIMENSIONS = 512
DAMPINGS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


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
        self.fitted = None  # EK-FAC's factors, which all dampings share
        self.earlier = 0.0  # seconds of what a method needs and found done: they count for each that needs it

    def loss(self, single):
        """Cross-entropy, as dattri calls it: of one row, or of a batch."""

        def function(parameters, data):
            image, label = (part.unsqueeze(0) for part in data) if single else data
            logits = torch.func.functional_call(self.model, parameters, (image,))
            return nn.functional.cross_entropy(logits, label.long())

        return function

    def trak(self, number):
        """Of one network: (queries, rows) products of projected gradients, and the rows' (rows,) weights.

        The library's scores of n networks are the mean of the one times the mean of the other. It seeds the projection
        of network n with 100,000 n; one network at a time is given that seed.
        """
        plain = self.loss(single=True)

        def odds(parameters, data):
            log_p = -plain(parameters, data)
            return log_p - torch.log(1 - torch.exp(log_p))

        def chance(parameters, data):
            return torch.exp(-plain(parameters, data))

        task = AttributionTask(loss_func=odds, model=self.model, checkpoints=[self.states[number]])
        how = {"proj_dim": DIMENSIONS, "proj_seed": 100_000 * number, "device": "cpu"}
        attributor = TRAKAttributor(task, chance, projector_kwargs=how, device="cpu")
        # The projection is drawn anew for every batch: larger batches change nothing but the time.
        attributor.cache(loader(self.given["images"], self.given["labels"], 1000))
        weights = attributor.Q
        attributor.Q = torch.ones_like(weights)
        return attributor.attribute(loader(self.given["query_images"], self.given["query_labels"], 500)).T, weights

    def traks(self, folder):
        """The scores of 1, 5, 10, ... networks; sums are kept after each."""
        path = folder / "trak-sums.pt"
        done = torch.load(path, weights_only=True) if path.exists() else None
        for number in range(0 if done is None else done["networks"], len(self.states)):
            began = time.process_time()
            products, weights = self.trak(number)
            spent = time.process_time() - began
            if done is None:
                done = {"networks": 0, "products": 0.0, "weights": 0.0, "seconds": 0.0}
            done = {
                "networks": number + 1, "products": done["products"] + products.double(),
                "weights": done["weights"] + weights.double(), "seconds": done["seconds"] + spent,
            }  # fmt: skip
            torch.save(done, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
            if number + 1 in TRAK_COUNTS:
                count = number + 1
                scores = done["products"] / count * (done["weights"] / count)
                keep(folder, f"dattri TRAK, {networks_in_words(count)}", count, scores, done["seconds"])
            print(f"TRAK, network {number}: {spent:.1f} s of processor", flush=True)

    def tracin(self, count):
        task = AttributionTask(loss_func=self.loss(single=True), model=self.model, checkpoints=self.states[:count])
        attributor = TracInAttributor(task, weight_list=torch.ones(count) * 1e-3, normalized_grad=False, device="cpu")
        return attributor.attribute(self.rows, self.queries).T

    def ekfac(self, damping):
        self.earlier = self.fitting if self.fitted else 0.0
        if self.fitted is None:
            began = time.process_time()
            task = AttributionTask(loss_func=self.loss(single=False), model=self.model, checkpoints=self.states[0])
            self.fitted = IFAttributorEKFAC(task, module_name=["0", "2", "4"])
            self.fitted.cache(self.rows)
            self.fitting = time.process_time() - began
        self.fitted.damping = damping
        # The queries' gradients are taken anew with every batch of rows, hence few batches.
        rows = loader(self.given["images"], self.given["labels"], 2500)
        queries = loader(self.given["query_images"], self.given["query_labels"], 500)
        return self.fitted.attribute(rows, queries).T

    def cg(self):
        task = AttributionTask(loss_func=self.loss(single=False), model=self.model, checkpoints=self.states[0])
        attributor = IFAttributorCG(task, max_iter=10, regularization=1e-2, device="cpu")
        attributor.cache(loader(self.given["images"], self.given["labels"], len(self.given["labels"])))
        few = loader(self.given["query_images"][:CG_QUERIES], self.given["query_labels"][:CG_QUERIES], 1)
        # It solves for a query anew with every batch of rows, hence few of them; and no_grad, so that no graph of all
        # its iterations is kept.
        with torch.no_grad():
            return attributor.attribute(loader(self.given["images"], self.given["labels"], 2500), few).T


def networks_in_words(count):
    return f"{count} network{'s' if count > 1 else ''}"


def keep(folder, name, count, scores, seconds, error=""):
    """What a method made of how many networks, or its error, for mnist_mlp.py."""
    kept = {"networks": torch.tensor(count), "seconds": torch.tensor(seconds), "error": error}
    kept |= {} if scores is None else {"scores": scores.detach().float()}
    torch.save(kept, folder / f"{name}.pt")
    print(f"{name}: {error or tuple(scores.shape)}, {seconds:.1f} s of processor", flush=True)


def main():
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    peer = Peer(folder)
    ten = min(10, len(peer.states))
    methods = {
        "dattri gradient dot, 1 network": (1, lambda: peer.tracin(1)),
        "dattri EK-FAC, 1 network": (1, lambda: peer.ekfac(0.0)),  # as shipped
        "dattri CG, 1 network, 25 queries": (1, peer.cg),
        f"dattri gradient dot, {networks_in_words(ten)}": (ten, lambda: peer.tracin(ten)),
    }
    for damping in DAMPINGS:
        methods[f"dattri EK-FAC, 1 network, damping {damping:g}"] = (1, lambda d=damping: peer.ekfac(d))
    chosen = sys.argv[2:] or ["dattri TRAK", *methods]
    for name in chosen:
        if name == "dattri TRAK":
            peer.traks(folder)
            continue
        if (folder / f"{name}.pt").exists():
            continue
        count, run = methods[name]
        began, scores, failed, peer.earlier = time.process_time(), None, "", 0.0
        try:
            with in_time():
                scores = run()
        except Exception as error:  # what cannot be run is said, with the error
            failed = f"{type(error).__name__}: {error}"
        keep(folder, name, count, scores, time.process_time() - began + peer.earlier, failed)


if __name__ == "__main__":
    main()
