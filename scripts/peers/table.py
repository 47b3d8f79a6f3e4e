"""The peers' table: LDS of every score matrix in an exchange folder, against the truth of scripts/lds_lora.py.

    python scripts/peers/table.py FOLDER [--halves 64] [--seeds 3]

Each method stands there as its library does it when nobody tunes it, and with the setting that scored best *on this
truth*, which nobody has in practice: it favours the peers. What could not be run stands there with its error.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from exchange import Exchange
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).parents[1]))

import corpora
import lora_world
from lds_lora import train
from results import report

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds
from hf_fwdattr.evaluation.retrain import retrain


def evaluated(exchange: Exchange, halves: torch.Tensor, outcomes: torch.Tensor) -> list[dict]:
    """Every record in the folder with its LDS, or with the error that kept it from one.

    Args:
        halves (`Tensor`): (subsets, rows). outcomes: (seeds, subsets, queries), losses in nats.
    """
    records = []
    for path in sorted((exchange.folder / "scores").glob("*.json")):
        record = json.loads(path.read_text())
        scores = path.with_suffix(".safetensors")
        if record["error"] is None:
            try:
                found = lds(load_file(scores)["scores"], halves, outcomes.mean(0))
                record |= {"lds": found.mean, "low": found.low, "high": found.high}
                record["one"] = lds(load_file(scores)["scores"], halves, outcomes[0]).mean
            except ValueError as error:  # scores that are not finite, for one
                record["error"] = str(error)
        records.append(record)
    return records


def chosen(records: list[dict], by: str = "lds") -> list[dict]:
    """Of each peer, method and number of models: as shipped, the best setting where that is another one, and failures.

    What failed in the same way with several settings stands there once.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["peer"], record["method"], record["models"]), []).append(record)
    kept = []
    for group in groups.values():
        shipped = [record for record in group if record["shipped"]]
        ran = [record for record in group if record["error"] is None]
        best = max(ran, key=lambda record: record[by], default=None)
        kept += shipped
        said = {record["error"] for record in shipped}
        for record in group:
            if record["error"] is not None and record["error"] not in said:
                said.add(record["error"])
                kept.append(record)
        if best is not None and not any(best is record for record in kept):
            kept.append(best)
    return sorted(kept, key=lambda record: -record.get(by, -2))


def line(record: dict, queries: int) -> dict:
    """One line of the printed table."""
    models = f", {record['models']} models" if record["models"] > 1 else ""
    head = {
        "peer": record["peer"],
        "method": record["method"] + models,
        "setting": record["setting"] + (" (as shipped)" if record["shipped"] else ""),
    }
    if record["error"] is not None:
        return head | dict.fromkeys(("LDS", "low", "high", "build s", "s / query", "bytes / row"), "-") | {
            "backward": record["error"]
        }  # fmt: skip
    built = record["build_s"]
    return head | {
        "LDS": record["lds"], "low": record["low"], "high": record["high"],
        "build s": "-" if built is None else round(built, 1), "s / query": record["query_s"] / queries,
        "bytes / row": round(record["row_bytes"]), "backward": record["backward"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--halves", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started, exchange = time.time(), Exchange(options.folder)
    halves = random_halves(len(exchange.rows), options.halves)
    truth = corpora.cache_folder() / f"lds-lora-truth-{lora_world.VERSION}"
    outcomes = retrain(
        train, halves, range(1, options.seeds + 1), truth, workers=options.workers, name=lora_world.NAME
    )
    records = evaluated(exchange, halves, outcomes)
    rows = [line(record, len(exchange.queries)) for record in chosen(records)]
    everything = [
        {key: record.get(key) for key in ("peer", "method", "models", "setting", "shipped", "lds", "one", "error")}
        for record in records
    ]
    report(
        "peers", f"LDS on the small LoRA world, {options.halves} halves x {options.seeds}", rows, started,
        settings="a peer's setting that is not as shipped is the best of those tried, on this truth", tried=everything,
    )  # fmt: skip


if __name__ == "__main__":
    main()
