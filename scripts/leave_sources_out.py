"""Leave whole sources out, for real: predicted against measured change of 40 queries' losses, in nats.

    python scripts/leave_sources_out.py [--sources 8] [--segments 3] [--ablate]

The order of batches and the size of every step stay as they were; only the source's rows weigh nothing. Beside the
removal stands the exact derivative of real training: central differences of runs with the source's weight at 1.3 and
0.7. Slopes are of measured on predicted change, so that 1 is a calibrated score. --ablate repeats it without the
shrinkage of the sampled curvature and with other weights of Adam's second-moment feedback: where the defaults come
from.
"""

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import corpora
import lora_world
import torch
from results import report

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.response import curvature
from hf_fwdattr.trainer import optimizer


def predicted(world: lora_world.World, segments: int, parameters: str) -> torch.Tensor:
    """(sources, queries): nats of each query owed to each source, from the sources' exact responses."""
    config = ResponseConfig(
        parameters=parameters,
        source_column="source",
        segments=segments,
        directions=1,
        source_directions=len(world.sources),
    )
    with tempfile.TemporaryDirectory() as folder:
        attribute = lora_world.attributed(world, ResponseCallback(config), folder)
        queries = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in world.queries]
        scores = attribute.source_scores(queries)
        order = [attribute.bank.manifest.sources.index(str(source)) for source in range(len(world.sources))]
        return scores.T[order].double()


def train(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """Losses of the queries after the same fine-tune with weighted rows."""
    world = lora_world.load()
    return lora_world.query_losses(
        lora_world.fine_tune(world, world.rows, seed, weights.double().tolist()), world.queries
    )


def agreement(real: torch.Tensor, said: torch.Tensor) -> tuple[float, float]:
    """Cosine, and slope of the real on the predicted change."""
    return float(real @ said / (real.norm() * said.norm())), float(real @ said / (said @ said))


def compare(world, sources: list[int], truth: dict[str, torch.Tensor], guess: torch.Tensor) -> list[dict]:
    """One line per source."""
    rows = []
    for number, source in enumerate(sources):
        removal = agreement(truth["removal"][number], guess[source])
        derivative = agreement(truth["derivative"][number], -guess[source])
        rows.append(
            {
                "source": f"source {source}", "cosine": removal[0], "slope": removal[1],
                "cosine, derivative": derivative[0], "slope, derivative": derivative[1],
                "own query, measured": float(truth["removal"][number][source]),
                "own query, predicted": float(guess[source][source]),
            }
        )  # fmt: skip
    return rows


def medians(rows: list[dict]) -> dict[str, float]:
    """Median over sources of each measure of agreement."""
    keys = ("cosine", "slope", "cosine, derivative", "slope, derivative")
    return {key: torch.tensor([row[key] for row in rows]).median().item() for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--parameters", default="lora")
    parser.add_argument("--ablate", action="store_true")
    options = parser.parse_args()
    started = time.time()
    world = lora_world.load()
    owner = torch.tensor(world.rows["source"])
    sources = list(range(0, len(world.sources), len(world.sources) // options.sources))[: options.sources]
    weights = [torch.ones(len(owner))]
    for source in sources:
        weights += [torch.where(owner == source, factor, 1.0) for factor in (0.0, 1.3, 0.7)]
    folder = Path(corpora.cache_folder()) / f"leave-sources-out-{lora_world.VERSION}"
    losses = retrain(train, torch.stack(weights), [0], folder, name=lora_world.NAME)[0]
    truth = {"removal": losses[1::3] - losses[0], "derivative": (losses[2::3] - losses[3::3]) / 0.6}
    rows = compare(world, sources, truth, predicted(world, options.segments, options.parameters))
    report(
        "leave_sources_out", f"{len(sources)} sources left out: change of 40 queries' losses, nats", rows, started,
        medians={key: round(value, 3) for key, value in medians(rows).items()},
    )  # fmt: skip
    if options.ablate:
        table = [{"variant": "as shipped", **medians(rows)}]
        for feedback, shrunk in ((0.0, False), (0.0, True), (1.0, True), (2.0, False), (3.0, True)):
            keep = curvature.ledoit_wolf if shrunk else (lambda *_: 0.0)
            with mock.patch.object(optimizer, "FEEDBACK", feedback), mock.patch.object(curvature, "ledoit_wolf", keep):
                guess = predicted(world, options.segments, options.parameters)
            name = f"feedback {feedback:g}, {'shrunk' if shrunk else 'unshrunk'} curvature"
            table.append({"variant": name, **medians(compare(world, sources, truth, guess))})
        report("leave_sources_out_ablation", "The same, other settings: medians over sources", table, started)


if __name__ == "__main__":
    main()
