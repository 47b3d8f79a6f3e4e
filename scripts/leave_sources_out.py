"""Leave whole sources out, for real: predicted against measured change of 40 queries' losses, in nats.

    python scripts/leave_sources_out.py [--sources 8] [--segments 3]

The order of batches and the size of every step stay as they were; only the source's rows weigh nothing. Slopes are of
measured on predicted change, so that 1 is a calibrated score.
"""

import argparse
import tempfile
import time

import lora_world
import torch
from results import report
from transformers import Trainer, default_data_collator, pipeline

from hf_fwdattr import ResponseCallback, ResponseConfig


def predicted(world: lora_world.World, segments: int, parameters: str) -> torch.Tensor:
    """(sources, queries): change of each query's loss if a source were left out, from the sources' exact scores."""
    config = ResponseConfig(
        parameters=parameters, source_column="source", segments=segments, probes=8, source_probes=len(world.sources)
    )
    callback = ResponseCallback(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=world.model(), args=lora_world.arguments(folder, seed=0), train_dataset=world.rows,
            data_collator=default_data_collator, callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        trainer.save_model(folder)
        attribute = pipeline("training-data-attribution", model=folder, tokenizer=world.tokenizer(), device="cpu")
        changes = torch.zeros(len(world.sources), len(world.queries), dtype=torch.float64)
        for number, row in enumerate(world.queries):
            readout = attribute.read([{"input_ids": row["input_ids"], "labels": row["input_ids"]}])
            for entry in attribute._sources(readout[0]):
                changes[int(entry["source"]), number] = entry["score"]
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--parameters", default="lora")
    options = parser.parse_args()
    started = time.time()
    world = lora_world.load()
    guess = predicted(world, options.segments, options.parameters)
    owner = torch.tensor(world.rows["source"])
    full = lora_world.query_losses(
        lora_world.fine_tune(world, world.rows, seed=0, weights=[1.0] * len(owner)), world.queries
    )
    rows = []
    for source in range(0, len(world.sources), len(world.sources) // options.sources)[: options.sources]:
        weights = (owner != source).double().tolist()
        without = lora_world.query_losses(lora_world.fine_tune(world, world.rows, 0, weights), world.queries)
        real, said = without - full, guess[source]
        rows.append(
            {
                "source": world.sources[source][:50],
                "cosine": float(real @ said / (real.norm() * said.norm())),
                "slope": float(real @ said / (said @ said)),
                "own query, measured": float(real[source]),
                "own query, predicted": float(said[source]),
            }
        )
    cosine, slope = (torch.tensor([row[key] for row in rows]).median().item() for key in ("cosine", "slope"))
    report(
        "leave_sources_out", "Eight sources left out: change of 40 queries' losses, nats", rows, started,
        median_cosine=round(cosine, 3), median_slope=round(slope, 3),
    )  # fmt: skip


if __name__ == "__main__":
    main()
