"""Whose style is a held-out article? Sources' scores and BM25 on SmolLM2-135M and news of nine publishers.

Prints attributions of generated text, and how often the publisher of a held-out article has the highest source score
for it, beside BM25 summed over a publisher's rows. About twelve minutes on two cores.
"""

import time

import torch

from hf_fwdattr.cli.tables import attribution_table
from hf_fwdattr.evaluation.agreement import sum_over_sources
from hf_fwdattr.pipeline import TrainingDataAttributionPipeline

from ..methods.bank import attributed_run
from ..methods.baselines import bm25
from ..registry import load_world
from ..report.results import report


PROMPTS = (
    "The Russian defense ministry said",
    "The Irish government has",
    "China's president Xi Jinping",
    "The Palestinian",
)


def run(rows: int = 14, held_out: int = 5, directions: int = 64, epochs: int = 3, model: str | None = None) -> None:
    started = time.time()
    options = {"rows": rows, "held_out": held_out, "epochs": epochs} | ({"model": model} if model else {})
    world = load_world("smollm2-news", **options)
    settings = {"parameters": "auto", "directions": directions, "source_column": world.source_column}
    with attributed_run(world, **settings) as run:
        built = time.time() - started
        attribute = TrainingDataAttributionPipeline(
            model=run.model, tokenizer=world.tokenizer, bank=run.bank, task="training-data-attribution"
        )
        for prompt in PROMPTS:
            attribution_table(prompt, attribute(prompt, dataset=world.rows, top_k=3, max_new_tokens=16), "text")
        scores = run.source_scores(world)
        explained = run.bank.manifest.explained_variance
    similar = sum_over_sources(
        bm25(world.texts(world.rows), world.texts(world.queries)), world.row_sources, len(world.sources)
    )
    truth = torch.tensor([world.sources.index(name) for name in world.queries["publisher"]])
    table = []
    for method, found in (("bank, exact source scores", scores), ("BM25, summed over a publisher's rows", similar)):
        ranks = (found > found.gather(1, truth[:, None])).sum(1)
        table.append(
            {"method": method, "first": float((ranks == 0).double().mean()),
             "first three": float((ranks < 3).double().mean()), "chance": 1 / len(world.sources),
             "articles": len(ranks)}
        )  # fmt: skip
    title = f"{len(world.rows)} articles of nine publishers: whose style is a held-out article?"
    report("publishers", title, table, started, train_and_bank_s=round(built), explained_variance=round(explained, 3))
