"""Known teachers: which method ranks a row first that taught the answer? The demo's model, rows and questions.

The base model, the fine-tune and the bank are those of `bash scripts/demo`. A query is a question with the answer that
the model gave, of which the answer is supervised; only right answers are asked. The peers, whose environments run on
the same exchange folder (see peers/all), attribute to all LoRA matrices, a bank of the demo to the B matrices. Scores
(queries, rows) are judged by where the teachers stand.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig
from hf_fwdattr.demo.ask import is_correct
from hf_fwdattr.demo.base_model import build_base
from hf_fwdattr.demo.facts import load_world
from hf_fwdattr.demo.finetune import fine_tune, tokenized
from hf_fwdattr.demo.run import job_on_facts
from hf_fwdattr.evaluation.metrics import recall
from hf_fwdattr.query.budget import DEFAULT_PASSES
from hf_fwdattr.query.loading import AutoModelForAttribution
from hf_fwdattr.query.scorer import Scorer

from ..corpora import cache_folder
from ..methods.baselines import bm25
from ..peers.exchange import Exchange, Result, hand_in, seconds
from ..peers.table import chosen, judged, line
from ..report.results import report
from .peers import gradient_dot


LENGTH, NEW = 128, 16  # tokens of a row, and of an answer, as in the demo
FIGURES = ("first", "among five", "recall@5", "MRR", "low", "high", "s / query")


def run(folder: Path | None = None) -> None:
    started = time.time()
    torch.set_num_threads(1)
    exchange = write_exchange(folder or cache_folder() / "peers-lora-facts")
    ours: dict[str, Any] = dict(peer="hf_fwdattr", backward="none")
    hand_in(exchange, "bank-exact", lambda: bank(exchange, None), method="response bank", setting="exact", **ours)
    hand_in(exchange, "bank-two-stages", lambda: bank(exchange, DEFAULT_PASSES), method="two stages",
            setting=f"{DEFAULT_PASSES} forward passes", shipped=True, **ours)  # fmt: skip
    baseline: dict[str, Any] = dict(peer="baseline", shipped=True)
    hand_in(exchange, "gradient-dot", lambda: gradient_dot(exchange), method="gradient dot product",
            setting="end of training", backward="query", **baseline)  # fmt: skip
    for prompts, setting in ((True, "prompt and answer"), (False, "answer alone")):
        hand_in(exchange, f"bm25-{setting.split()[0]}", lambda prompts=prompts: word_match(exchange, prompts),
                method="BM25", setting=setting, backward="none", **baseline)  # fmt: skip
    asked, known = _known(exchange)["questions"], teachers(exchange)
    records = judged(exchange, lambda scores: judge(scores, known))
    keys = ("peer", "method", "setting", "shipped", "first", "among five", "MRR", "error")
    report(
        "facts", f"Rows that taught the answer: {len(exchange.queries)} right answers to {asked} questions",
        [line(record, FIGURES) for record in chosen(records, "MRR")], started, right=len(exchange.queries),
        questions=asked, training_rows=len(exchange.rows), tried=[{k: r.get(k) for k in keys} for r in records],
    )  # fmt: skip


def judge(scores: Tensor, known: Tensor) -> dict[str, float]:
    """Return how often a teacher is first or among five, and the mean reciprocal rank."""
    found = recall(scores, known, (1, 5))
    return {
        "first": found.hits[1].mean, "among five": found.hits[5].mean, "recall@5": found.at[5].mean,
        "MRR": found.mrr.mean, "low": found.mrr.low, "high": found.mrr.high,
    }  # fmt: skip


def write_exchange(folder: Path) -> Exchange:
    """Write the exchange folder, once, with the fine-tune's bank beside its adapter."""
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        world, base = load_world(), folder / "base"
        build_base(world.lessons, world.prose, base)
        job = job_on_facts(str(base.resolve()), world, None, None)
        tokenizer = AutoTokenizer.from_pretrained(base)
        train = tokenized(job.rows.texts, job.rows.sources, tokenizer, LENGTH)
        config = ResponseConfig(directions="exact", source_column="source", quiet=True)
        trainer = fine_tune(job.base, train, folder / "adapters" / "0", job.fine_tune, [ResponseCallback(config)])
        asked, facts = [], []
        for question in world.questions:
            prompt, answer = answered(trainer.model.eval(), tokenizer, question.prompt)
            text = tokenizer.decode(answer)
            if is_correct(text, question.answer):
                asked.append((prompt + answer, [-100] * len(prompt) + answer))
                facts.append({"prompt": question.prompt, "said": text, "wording": question.wording,
                              "rows": sorted(question.rows)})  # fmt: skip
        rows, row_labels = padded([(ids, ids) for ids in train["input_ids"]])
        queries, query_labels = padded(asked)
        tokens = {"rows": rows, "row_labels": row_labels, "queries": queries, "query_labels": query_labels}
        save_file(tokens, folder / "tokens.safetensors")
        known = {"texts": list(job.rows.texts), "questions": len(world.questions), "facts": facts}
        (folder / "facts.json").write_text(json.dumps(known, indent=1))
    return Exchange(folder)


def answered(model: Any, tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Return token ids of a prompt and of its greedy continuation without the end-of-text token."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    answer = text[0, ids.shape[1] :].tolist()
    return ids[0].tolist(), answer[:-1] if len(answer) > 1 and answer[-1] == tokenizer.eos_token_id else answer


def padded(lists: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return token ids and labels (lists, longest), padded on the right, where no token sees it."""
    longest = max(len(ids) for ids, _ in lists)
    ids = torch.tensor([own + [0] * (longest - len(own)) for own, _ in lists])
    return ids, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in lists])


def used(labels: list[int]) -> int:
    """Return the number of tokens before the padding."""
    return max(place for place, label in enumerate(labels) if label != -100) + 1


def teachers(exchange: Exchange) -> Tensor:
    """Return which rows taught each query's answer, (queries, rows) booleans."""
    facts = _known(exchange)["facts"]
    known = torch.zeros(len(facts), len(exchange.rows), dtype=torch.bool)
    for query, fact in enumerate(facts):
        known[query, fact["rows"]] = True
    return known


def bank(exchange: Exchange, budget: int | None) -> Result:
    """Score by the bank beside the adapter: all directions, or two stages within so many forward passes."""
    folder = exchange.folder / "adapters" / "0"
    model, own = AutoModelForAttribution.from_pretrained(str(folder)).eval(), ResponseBank.from_pretrained(folder)
    scorer = Scorer(own, model)
    queries = [
        {"input_ids": ids[: used(labels)], "labels": labels[: used(labels)]}
        for ids, labels in zip(exchange.queries.tolist(), exchange.query_labels.tolist(), strict=True)
    ]
    began = seconds()
    if budget is None:
        scores = scorer.scores(queries)
    else:
        scores = torch.stack([scorer.rank(query, 10, budget).scores for query in queries])
    kinds = ("coordinates",) if budget is None else ("coordinates", "row_codes")
    stored = sum(file.size for file in own.manifest.files if file.kind in kinds)
    return Result(scores, None, seconds() - began, stored / len(exchange.rows))


def word_match(exchange: Exchange, prompts: bool) -> Result:
    """Score by BM25 of the answer with its question, or alone."""
    known, began = _known(exchange), seconds()
    texts = [(fact["prompt"] + " " if prompts else "") + fact["said"] for fact in known["facts"]]
    return Result(bm25(known["texts"], texts, stopwords=prompts), None, seconds() - began, 0.0)


def _known(exchange: Exchange) -> dict[str, Any]:
    return json.loads((exchange.folder / "facts.json").read_text())
