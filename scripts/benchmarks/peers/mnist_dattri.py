"""TRAK, TracIn, EK-FAC and CG influence of the MNIST networks with dattri 0.3.0, in its own environment.

    python -m benchmarks mnist --hand-out FOLDER         # the networks and digits, as plain tensors
    .venvs/dattri/bin/python peers/mnist_dattri.py FOLDER [METHOD ...]
    python -m benchmarks mnist --peers FOLDER            # judges what this wrote

Settings are those of dattri's own MNIST benchmark (TRAK: 512 dimensions; CG: 10 iterations, regularisation 1e-2), for
EK-FAC the library's default damping of 0 and five others. Its benchmark's TRAK attributes to networks trained on
halves, here they are the networks that all methods attribute to. A method that was done is not done again, and TRAK,
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


CG_QUERIES, DIMENSIONS = 25, 512
TRAK_COUNTS = (1, 5, 10, 50)  # networks after which TRAK's scores are kept
DAMPINGS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


class Peer:
    """The methods, each returning scores (queries, rows), larger if the row helps."""

    def __init__(self, folder):
        self.given = torch.load(folder / "given.pt", weights_only=True)
        layers = []
        for inner, outer in pairwise(self.given["widths"].tolist()):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])  # without dropout, as in evaluation
        named = dict(self.model.named_parameters())
        self.states = []
        for theta in self.given["ends"]:
            parts = theta.split([p.numel() for p in named.values()])
            pairs = zip(named.items(), parts, strict=True)
            self.states.append({name: part.view(p.shape).clone() for (name, p), part in pairs})
        self.fitted = None  # EK-FAC's factors, which all dampings share
        self.earlier = 0.0  # seconds of what a method needs and found done: they count for each that needs it

    def rows(self, size=250):
        return DataLoader(TensorDataset(self.given["images"], self.given["labels"]), batch_size=size, shuffle=False)

    def queries(self, size=250, count=None):
        given = self.given["query_images"][:count], self.given["query_labels"][:count]
        return DataLoader(TensorDataset(*given), batch_size=size, shuffle=False)

    def loss(self, single):
        """Return the cross-entropy as dattri calls it: of one row, or of a batch."""

        def function(parameters, data):
            image, label = (part.unsqueeze(0) for part in data) if single else data
            logits = torch.func.functional_call(self.model, parameters, (image,))
            return nn.functional.cross_entropy(logits, label.long())

        return function

    def trak(self, number):
        """Return one network's products (queries, rows) of projected gradients, and the rows' weights (rows,).

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
        projection = {"proj_dim": DIMENSIONS, "proj_seed": 100_000 * number, "device": "cpu"}
        attributor = TRAKAttributor(task, chance, projector_kwargs=projection, device="cpu")
        attributor.cache(self.rows(1000))  # drawn anew for every batch: larger batches change nothing but the time
        weights = attributor.Q
        attributor.Q = torch.ones_like(weights)
        return attributor.attribute(self.queries(500)).T, weights

    def traks(self, folder):
        """Write the scores of 1, 5, 10, ... networks; sums are kept after each."""
        path = folder / "trak-sums.pt"
        sums = {"networks": 0, "products": 0.0, "weights": 0.0, "seconds": 0.0}
        sums = torch.load(path, weights_only=True) if path.exists() else sums
        for count in range(sums["networks"] + 1, len(self.states) + 1):
            began = time.process_time()
            products, weights = self.trak(count - 1)
            sums = {
                "networks": count, "products": sums["products"] + products.double(),
                "weights": sums["weights"] + weights.double(),
                "seconds": sums["seconds"] + time.process_time() - began,
            }  # fmt: skip
            torch.save(sums, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
            if count in TRAK_COUNTS:
                scores = sums["products"] / count * (sums["weights"] / count)
                keep(folder, f"dattri TRAK, {networks_in_words(count)}", count, scores, sums["seconds"])

    def tracin(self, count):
        task = AttributionTask(loss_func=self.loss(single=True), model=self.model, checkpoints=self.states[:count])
        attributor = TracInAttributor(task, weight_list=torch.ones(count) * 1e-3, normalized_grad=False, device="cpu")
        return attributor.attribute(self.rows(), self.queries()).T

    def ekfac(self, damping):
        self.earlier = self.fitting if self.fitted else 0.0
        if self.fitted is None:
            began = time.process_time()
            task = AttributionTask(loss_func=self.loss(single=False), model=self.model, checkpoints=self.states[0])
            self.fitted = IFAttributorEKFAC(task, module_name=["0", "2", "4"])
            self.fitted.cache(self.rows())
            self.fitting = time.process_time() - began
        self.fitted.damping = damping
        # The queries' gradients are taken anew with every batch of rows, hence few batches.
        return self.fitted.attribute(self.rows(2500), self.queries(500)).T

    def cg(self):
        task = AttributionTask(loss_func=self.loss(single=False), model=self.model, checkpoints=self.states[0])
        attributor = IFAttributorCG(task, max_iter=10, regularization=1e-2, device="cpu")
        attributor.cache(self.rows(len(self.given["labels"])))
        # It solves for a query anew with every batch of rows, hence few of them; and no_grad, so that no graph of all
        # its iterations is kept.
        with torch.no_grad():
            return attributor.attribute(self.rows(2500), self.queries(1, CG_QUERIES)).T


def networks_in_words(count):
    return f"{count} network{'s' if count > 1 else ''}"


def keep(folder, name, count, scores, seconds, error=""):
    """Write a method's scores of so many networks, or its error, for the `mnist` measurement."""
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
    for name in sys.argv[2:] or ["dattri TRAK", *methods]:
        if name == "dattri TRAK":
            peer.traks(folder)
        elif not (folder / f"{name}.pt").exists():
            count, run = methods[name]
            began, scores, failed, peer.earlier = time.process_time(), None, "", 0.0
            try:
                with in_time():
                    scores = run()
            except Exception as error:  # a method that cannot be run is kept with its error
                failed = f"{type(error).__name__}: {error}"
            keep(folder, name, count, scores, time.process_time() - began + peer.earlier, failed)


if __name__ == "__main__":
    main()
