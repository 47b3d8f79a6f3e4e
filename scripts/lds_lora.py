"""Linear datamodeling score of response banks on the small LoRA world, against real retraining.

    python scripts/lds_lora.py [--halves 64] [--seeds 3] [--workers 2]

Ground truth: random halves of the 480 rows, each fine-tuned three times with fresh batch order by the real Trainer,
and the losses of 40 queries after it (about fifteen minutes on two cores, kept and resumed). Predicted: the rows'
scores from banks made by the real callback and read by the real pipeline. Beside them the gradient dot product and
BM25.
"""

import argparse
import tempfile
import time
from pathlib import Path

import bm25s
import corpora
import lora_world
import torch
from results import report

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds, noise_ceiling
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import Parameters


def train(kept: torch.Tensor, seed: int) -> torch.Tensor:
    """Losses of the queries after a fine-tune on the kept rows."""
    world = lora_world.load()
    rows = world.rows.select(kept.nonzero().flatten().tolist())
    return lora_world.query_losses(lora_world.fine_tune(world, rows, seed), world.queries)


def bank_scores(world: lora_world.World, queries: list[dict], **settings) -> tuple[torch.Tensor, dict]:
    """(queries, rows) of a bank made while training, and what it cost."""
    callback = ResponseCallback(ResponseConfig(parameters="lora", **settings))
    with tempfile.TemporaryDirectory() as folder:
        attribute = lora_world.attributed(world, callback, folder)
        began = time.time()
        scores = attribute.scores(queries, batch_size=1)
        spent = time.time() - began
    manifest = callback.bank.manifest
    return scores, {
        "directions": manifest.directions,
        "kept": manifest.explained_variance,
        "query_s": spent / len(queries),
    }


def gradient_dot(world: lora_world.World, queries: list[dict]) -> torch.Tensor:
    """Gradient dot product at the end of training, all LoRA weights: the first-order baseline."""
    model = lora_world.fine_tune(world, world.rows, seed=0)
    parameters = Parameters.of(model, "lora")
    with frozen(model):
        gradients = PerSampleGradients(model, parameters, CAUSAL_LM)

        def of(rows: list[dict]) -> torch.Tensor:
            batches = [rows[at : at + 16] for at in range(0, len(rows), 16)]
            stacked = [{k: torch.tensor([row[k] for row in b]) for k in ("input_ids", "labels")} for b in batches]
            return torch.cat([gradients(batch)[0] for batch in stacked])

        return of(queries) @ of(list(world.rows)).T


def bm25(world: lora_world.World, queries: list[dict]) -> torch.Tensor:
    """BM25 of the rows' words for the query's words."""
    tokenizer = world.tokenizer()

    def words(rows: list[dict]) -> list[str]:
        return [tokenizer.decode(row["input_ids"]) for row in rows]

    index = bm25s.BM25()
    index.index(bm25s.tokenize(words(list(world.rows)), show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(words(queries), return_ids=False, show_progress=False)
    return torch.stack([torch.from_numpy(index.get_scores(query)) for query in tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--halves", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started = time.time()
    world = lora_world.load()
    queries = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in world.queries]
    halves = random_halves(len(world.rows), options.halves)
    folder = Path(corpora.cache_folder()) / f"lds-lora-truth-{lora_world.VERSION}"
    outcomes = retrain(
        train, halves, range(1, options.seeds + 1), folder, workers=options.workers, name=lora_world.NAME
    )
    mean = outcomes.mean(0)
    rows = []

    def add(method: str, scores: torch.Tensor, cost: dict) -> None:
        against_mean, against_one = lds(scores, halves, mean), lds(scores, halves, outcomes[0])
        rows.append(
            {
                "method": method,
                "LDS": against_mean.mean,
                "low": against_mean.low,
                "high": against_mean.high,
                "LDS one retraining": against_one.mean,
                "directions": cost.get("directions", "-"),
                "kept": cost.get("kept", "-"),
                "s / query": cost.get("query_s", "-"),
            }
        )
        print(f"{method}: {against_mean.mean:.3f}", flush=True)

    for name, settings in (
        ("bank, exact, three segments", {"directions": "exact"}),
        ("bank, k = 256", {"directions": 256}),
        ("bank, k = 128", {"directions": 128}),
        ("bank, k = 64", {"directions": 64}),
        ("bank, exact, one segment", {"directions": "exact", "segments": 1}),
        ("bank, exact, five segments", {"directions": "exact", "segments": 5}),
        ("bank, exact, six curvature samples a row", {"directions": "exact", "curvature_samples": 6 * 480}),
        ("bank, exact, mean of ends", {"directions": "exact", "averaging": "trajectory"}),
        ("bank, k = 128, mean of ends", {"directions": 128, "averaging": "trajectory"}),
    ):
        add(name, *bank_scores(world, queries, **settings))
    add("gradient dot product", gradient_dot(world, queries), {})
    add("BM25", bm25(world, queries), {})
    ceiling = noise_ceiling(outcomes)
    report(
        "lds_lora", f"LDS against the mean of {options.seeds} retrainings of {options.halves} halves", rows, started,
        noise_ceiling=round(ceiling.mean, 4), gap_exact_to_128=round(rows[0]["LDS"] - rows[2]["LDS"], 4),
    )  # fmt: skip


if __name__ == "__main__":
    main()
