"""What it takes to have scores come with the tokens: latency per token, against generating and asking afterwards.

    python scripts/streaming.py [--rows 2000] [--tokens 32]

SmolLM2-135M on nine publishers (scripts/smollm2_world.py), greedy, one prompt. Seconds of the processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from results import report
from smollm2_world import world

from hf_fwdattr.objective import IGNORED


PROMPT = "The Russian defense ministry said"
REPEATS = 3


def spent(work: Callable[[], object]) -> float:
    """Seconds of the processor, the median of some calls after one that does not count."""
    work()
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    started = time.time()
    attribute, _ = world(options.rows)
    settings = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    prompt = attribute.tokenizer(PROMPT, return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    with torch.no_grad():
        text = attribute.model.generate(**prompt, **settings)[0]
        alone = spent(lambda: attribute.model.generate(**prompt, **settings))
    labels = text.clone()
    labels[:start] = IGNORED
    query = {"input_ids": text.tolist(), "labels": labels.tolist()}
    afterwards = spent(lambda: attribute.source_scores([query]))
    rows = [{"what": "generating alone", "probes": 0, "ms a token": 1000 * alone / options.tokens, "ratio": 1.0}]

    def add(what: str, probes: int, seconds: float) -> None:
        rows.append(
            {
                "what": what, "probes": probes, "ms a token": 1000 * seconds / options.tokens,
                "ratio": round(seconds / alone, 2),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)

    sources = attribute.bank.manifest.source_probes
    add("generating, sources afterwards", sources, alone + afterwards)
    add("generating with sources", sources, spent(lambda: list(attribute.stream(PROMPT, **settings))))
    reader = attribute._reader
    with torch.no_grad():
        for probes in (32, 128):
            reader.lines = lambda count, probes=probes: slice(attribute.bank.manifest.probes - probes, None)
            add(
                "generating with sources and rows",
                probes + sources,
                spent(lambda: list(attribute.stream(PROMPT, **settings))),
            )
    said = list(attribute.stream(PROMPT, **settings))
    total = torch.zeros(sources)
    names = attribute.bank.manifest.sources
    for item in said:
        for source in item["sources"]:
            total[names.index(source["source"])] += source["score"]
    after = attribute.source_scores([query])[0]
    report(
        "streaming", f"Scores with the tokens, SmolLM2-135M, {options.tokens} tokens after {start}", rows, started,
        largest_difference=float((total - after).abs().max() / after.abs().max()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
