"""Known teachers: which method ranks a row first that taught the answer? The demo's model, rows and questions.

    python scripts/peers/facts.py FOLDER                     # trains, asks, writes the exchange folder, judges
    .venvs/kronfluence/bin/python scripts/peers/kronfluence_run.py FOLDER      # and others; then once more the first

The base model, the fine-tune and the bank are those of `bash scripts/demo`. A query is a question with the answer that
the model gave, of which the answer is supervised; only right answers are asked. The peers attribute to all LoRA
matrices, a bank of the demo to the B matrices. Scores (queries, rows) are judged by where the teachers stand.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from exchange import Exchange, Result, hand_in, seconds
from safetensors.torch import load_file, save_file
from torch import Tensor


sys.path.insert(0, str(Path(__file__).parents[1]))

from results import report
from table import chosen
from transformers import AutoTokenizer, pipeline
from world import gradient_dot

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.demo.asking import is_correct
from hf_fwdattr.demo.base import build_base
from hf_fwdattr.demo.baseline import TextSimilarity
from hf_fwdattr.demo.facts import load_world
from hf_fwdattr.demo.finetune import fine_tune, tokenized
from hf_fwdattr.demo.job import job_on_facts
from hf_fwdattr.evaluation.metrics import recall
from hf_fwdattr.query.scorer import BUDGET


LENGTH, NEW = 128, 16  # tokens of a row, and of an answer, as in the demo


def write(folder: Path) -> Exchange:
    """The exchange folder, made once, with the fine-tune's bank beside its adapter."""
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        world, base = load_world(), folder / "base"
        build_base(world.lessons, world.prose, base)
        job = job_on_facts(str(base.resolve()), world, None, None)
        tokenizer = AutoTokenizer.from_pretrained(base)
        train = tokenized(job.texts, job.sources, tokenizer, LENGTH)
        config = ResponseConfig(directions="exact", source_column="source", quiet=True)
        trainer = fine_tune(job.base, train, folder / "adapters" / "0", job.settings, [ResponseCallback(config)])
        asked, facts = [], []
        for question in world.questions:
            prompt, said = answered(trainer.model.eval(), tokenizer, question.prompt)
            text = tokenizer.decode(said)
            if is_correct(text, question.answer):
                asked.append((prompt + said, [-100] * len(prompt) + said))
                facts.append({"prompt": question.prompt, "said": text, "wording": question.wording,
                              "rows": sorted(question.rows)})  # fmt: skip
        rows, row_labels = padded([(ids, ids) for ids in train["input_ids"]])
        queries, query_labels = padded(asked)
        tokens = {"rows": rows, "row_labels": row_labels, "queries": queries, "query_labels": query_labels}
        save_file(tokens, folder / "tokens.safetensors")
        known = {"texts": list(job.texts), "questions": len(world.questions), "facts": facts}
        (folder / "facts.json").write_text(json.dumps(known, indent=1))
    return Exchange(folder)


def answered(model: Any, tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its greedy continuation without the end-of-text token, as the pipeline has it."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    said = text[0, ids.shape[1] :].tolist()
    return ids[0].tolist(), said[:-1] if len(said) > 1 and said[-1] == tokenizer.eos_token_id else said


def padded(lists: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels (lists, longest); the padding stands on the right, where no token sees it."""
    longest = max(len(ids) for ids, _ in lists)
    ids = torch.tensor([own + [0] * (longest - len(own)) for own, _ in lists])
    return ids, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in lists])


def teachers(exchange: Exchange) -> Tensor:
    """(queries, rows) booleans."""
    facts = json.loads((exchange.folder / "facts.json").read_text())["facts"]
    known = torch.zeros(len(facts), len(exchange.rows), dtype=torch.bool)
    for query, fact in enumerate(facts):
        known[query, fact["rows"]] = True
    return known


def bank(exchange: Exchange, budget: int | None) -> Result:
    """This library, by the bank beside the adapter: all directions, or two stages within so many forward passes."""
    folder = exchange.folder / "adapters" / "0"
    attribute = pipeline("training-data-attribution", model=str(folder), device="cpu")
    queries = [
        {"input_ids": ids[: used(labels)], "labels": labels[: used(labels)]}
        for ids, labels in zip(exchange.queries.tolist(), exchange.query_labels.tolist(), strict=True)
    ]
    began = seconds()
    if budget is None:
        scores = attribute.scores(queries)
    else:
        scores = torch.stack([attribute._reader.rank(query, 10, budget)[1] for query in queries])
    files = attribute.bank.manifest.files
    kinds = ("coordinates",) if budget is None else ("coordinates", "responses", "kernel")
    kept = sum(file.size for file in files if file.kind in kinds)
    return Result(scores, None, seconds() - began, kept / len(exchange.rows))


def used(labels: list[int]) -> int:
    """How many tokens stand before the padding."""
    return max(place for place, label in enumerate(labels) if label != -100) + 1


def word_match(exchange: Exchange, prompts: bool) -> Result:
    """BM25, of the answer with its question, or alone."""
    kept = json.loads((exchange.folder / "facts.json").read_text())
    began = seconds()
    index = TextSimilarity(kept["texts"], stopwords=prompts)
    texts = [(fact["prompt"] + " " if prompts else "") + fact["said"] for fact in kept["facts"]]
    scores = torch.stack([torch.from_numpy(index.scores(text)) for text in texts])
    return Result(scores, None, seconds() - began, 0.0)


def judged(exchange: Exchange) -> list[dict[str, Any]]:
    """Every record in the folder: how often a teacher is first or among five, and the mean reciprocal rank."""
    known, records = teachers(exchange), []
    for path in sorted((exchange.folder / "scores").glob("*.json")):
        record = json.loads(path.read_text())
        if record["error"] is None:
            try:
                found = recall(load_file(path.with_suffix(".safetensors"))["scores"], known, (1, 5))
                record |= {"first": found.hits[1].mean, "among five": found.hits[5].mean}
                record |= {"recall@5": found.at[5].mean}
                record |= {"MRR": found.mrr.mean, "low": found.mrr.low, "high": found.mrr.high}
                record |= {"s / query": record["query_s"] / len(known)}
            except ValueError as error:  # scores that are not finite, for one
                record["error"] = str(error)
        records.append(record)
    return records


def line(record: dict[str, Any]) -> dict[str, Any]:
    """One line of the printed table."""
    shipped = " (as shipped)" if record["shipped"] else ""
    head = {"peer": record["peer"], "method": record["method"], "setting": record["setting"] + shipped}
    figures = ("first", "among five", "recall@5", "MRR", "low", "high", "s / query")
    said = record["backward"] if record["error"] is None else record["error"]
    return head | {key: record.get(key, "-") for key in figures} | {"backward": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    exchange = write(options.folder)
    ours = dict(peer="hf_fwdattr", backward="none")
    hand_in(exchange, "bank-exact", lambda: bank(exchange, None), method="response bank", setting="exact", **ours)
    hand_in(exchange, "bank-two-stages", lambda: bank(exchange, BUDGET), method="two stages",
            setting=f"{BUDGET} forward passes", shipped=True, **ours)  # fmt: skip
    baseline = dict(peer="baseline", shipped=True)
    hand_in(exchange, "gradient-dot", lambda: gradient_dot(exchange), method="gradient dot product",
            setting="end of training", backward="query", **baseline)  # fmt: skip
    for prompts, setting in ((True, "prompt and answer"), (False, "answer alone")):
        hand_in(exchange, f"bm25-{setting.split()[0]}", lambda prompts=prompts: word_match(exchange, prompts),
                method="BM25", setting=setting, backward="none", **baseline)  # fmt: skip
    asked = json.loads((exchange.folder / "facts.json").read_text())["questions"]
    records = judged(exchange)
    kept = ("peer", "method", "setting", "shipped", "first", "among five", "MRR", "error")
    report(
        "facts", f"Rows that taught the answer: {len(exchange.queries)} right answers to {asked} questions",
        [line(record) for record in chosen(records, "MRR")], started, right=len(exchange.queries), questions=asked,
        training_rows=len(exchange.rows), tried=[{key: record.get(key) for key in kept} for record in records],
    )  # fmt: skip


if __name__ == "__main__":
    main()
