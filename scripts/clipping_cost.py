"""What it costs to ignore gradient clipping: scores of sources against the derivative of real training.

    python scripts/clipping_cost.py [--optimizers sgd adamw_torch] [--norms 0 1 0.3] [--add]

The tiny world of tests/test_sources_removed.py: eight sources of four rows, six epochs. Each source's weight is nudged
to 1.2 and 0.8 in real runs of the same batches, and the change of 16 queries' losses per unit of weight is compared
with the scores, once with every step's clipping counted as a smaller rate and once as if nothing had been clipped.
Medians over the sources. A norm of 0 clips nothing. About ten minutes on one core.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from results import FOLDER, report


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_fwdattr import build_bank  # noqa: E402
from hf_fwdattr.trainer.reweighting import apply_row_weights, query_losses  # noqa: E402
from tests.helpers.cases import adapted, padded  # noqa: E402
from tests.helpers.runs import ask, base, config, fine_tune, trainer_for  # noqa: E402
from tests.test_sources_removed import EACH, QUERIES, SOURCES, _dialects  # noqa: E402


NUDGE = 0.2
RATES = {"sgd": 0.1, "adamw_torch": 2e-3}


def compared(optimizer: str, norm: float, folder: Path) -> dict[str, float]:
    """Cosine and slope of measured on predicted changes, with clipping and without."""
    rows = _dialects(SOURCES * EACH, seed=1)
    asked = [{k: row[k] for k in ("input_ids", "labels")} for row in _dialects(QUERIES, seed=2)]
    how = dict(optim=optimizer, learning_rate=RATES[optimizer], num_train_epochs=6, max_grad_norm=norm)
    settings, data, model = config(parameters="lora", directions=1), Dataset.from_list(rows), adapted(base())
    callback = fine_tune(folder, model, settings, data, **how)
    record, banks = callback.recorder.record, {"counted": callback.bank}
    clips, record.clips = record.clips, [1.0] * len(record.clips)
    record.save(folder / "record")
    banks["ignored"] = build_bank(model, data, settings, data_collator=padded, record=folder / "record")
    said = {name: -ask(model, bank).source_scores(asked).double() for name, bank in banks.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in banks}
    for source in range(SOURCES):
        ends = []
        for sign in (1, -1):
            weights = torch.tensor([1.0 + sign * NUDGE * (row["source"] == str(source)) for row in rows])
            trainer = apply_row_weights(trainer_for(folder, adapted(base()), data, None, **how), weights)
            trainer.train()
            ends.append(query_losses(trainer.model, asked))
        real = (ends[0] - ends[1]) / (2 * NUDGE)
        for name, scores in said.items():
            one = scores[:, source]
            found[name].append((float(real @ one / (real.norm() * one.norm())), float(real @ one / (one @ one))))
    medians = {name: torch.tensor(pairs).median(0).values.tolist() for name, pairs in found.items()}
    return {"mean factor": sum(clips) / len(clips)} | {
        f"{what}, {name}": pair[at] for name, pair in medians.items() for at, what in enumerate(("cosine", "slope"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw_torch"])
    parser.add_argument("--norms", nargs="+", type=float, default=[0.0, 1.0, 0.3])
    parser.add_argument("--add", action="store_true", help="to the lines of an earlier run")
    options = parser.parse_args()
    started, rows = time.time(), []
    earlier = FOLDER / "clipping_cost.json"
    if options.add and earlier.exists():
        rows = json.loads(earlier.read_text())["rows"]
    for optimizer in options.optimizers:
        for norm in options.norms:
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"optimizer": optimizer, "max_grad_norm": norm} | compared(optimizer, norm, Path(folder)))
            print(rows[-1], flush=True)
    report("clipping_cost", "Ignored and counted clipping against the derivative of real training", rows, started)


if __name__ == "__main__":
    main()
