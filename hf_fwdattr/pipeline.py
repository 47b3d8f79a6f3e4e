"""Attribution pipeline of transformers: tokenizes, generates, and formats the scores of `query.Scorer`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.logging import is_progress_bar_enabled

from .bank.bank import ResponseBank
from .errors import BankError, QueryError
from .models.likelihood import IGNORED
from .query.budget import Budget
from .query.classifier_inputs import class_names, labelled_queries, tokenize_text
from .query.generation import check_room, check_settings
from .query.inputs import Query, check_batch_size, check_queries, check_tokens, check_top_k
from .query.loading import AutoModelForAttribution
from .query.locking import one_at_a_time
from .query.ranking import RankedRows
from .query.results import Attribution, AttributionResult, ClassificationResult, RowScore, SourceScore
from .query.scorer import Scorer
from .query.tokens import output_text, tokenize_input
from .query.training_set import TrainingSet


__all__ = ["TASK", "TrainingDataAttributionPipeline", "register"]

TASK = "training-data-attribution"
_OPTIONS = (
    "dataset",
    "top_k",
    "verify_dataset",
    "budget",
    "generate_kwargs",
)  # of a call; at construction they become its defaults


class TrainingDataAttributionPipeline(Pipeline):
    """Generate an output, or take a given one, and score the training rows and sources that contributed to it.

    ```python
    >>> attribute = pipeline("training-data-attribution", model="path/or/repo/of/the/adapter")
    >>> attribute("The capital of Chad is", dataset=train, top_k=1, max_new_tokens=8)
    {'generated_text': " N'Djamena.",
     'tokens': [' N', "'", 'D', 'jam', 'ena', '.'],
     'token_ids': [399, 6, 35, 39159, 8107, 13],
     'offsets': [(0, 2), (2, 3), (3, 4), (4, 7), (7, 10), (10, 11)],
     'examples': [
        {'row': 241, 'score': 3.1, 'std': 0.02, 'exact': True,
         'token_scores': [0.9, 0.1, 0.8, 0.7, 0.5, 0.1], 'source': 'almanac',
         'example': {'text': "Chad's capital is N'Djamena.", ...}},
        {'row': 87, 'score': -0.4, 'std': 0.01, 'exact': True, 'token_scores': [-0.3, ...], 'source': 'web', ...}],
     'sources': [{'source': 'almanac', 'score': 4.2}, {'source': 'web', 'score': -0.2}]}
    ```

    A score is the part of the output's log-likelihood, in nats and to first order, that training on a row added:
    without the row, it would be lower by the score. Rows with positive scores are proponents, the others opponents.

    An input is a text, a chat (a list of messages; a last one of the assistant is continued), or `{"prompt": text or
    chat, "completion": text or messages}` for an output that is given instead of generated; or token ids, a list of
    them, `{"prompt_ids": ..., "completion_ids": ...}`; or a training row: with `input_ids` and `labels`, with
    `messages`, whose last one is the output, or with `text`, all of it output; or a list, dataset or generator of
    these. A completion continues the prompt's text as it stands, spaces included, and both are tokenized together.
    Arguments of a call that are not listed below go to `generate`. All options of a call can be given at construction,
    for all calls. Threads may share a pipeline: it answers one at a time.

    Args:
        model, tokenizer, device, ...: as in every pipeline. The bank is looked for beside the model.
        bank (`str`, `Path` or `ResponseBank`, *optional*): where the bank is, if not beside the model.
        readout (`str`, defaults to `auto`): `auto` differentiates GPT-2, Llama and its descendants by analytic layers
            and other models by torch's forward mode; `jvp` uses torch's forward mode for all, and `difference` finite
            differences, for models that can only run forwards.
        precision (`str`, defaults to `auto`): `full`; `half`, bfloat16 products (a score is off by some 4e-3 of
            itself); or `auto`, half for scores in two stages (see `budget`) on a processor with such instructions.
        allow_mismatch (`list[str]`, *optional*): what may differ from the bank: "weights" (the tracked parameters),
            "tokenizer", "dataset".
        dataset (per call, *optional*): the training set, tokenized or raw (`messages`, `prompt` and `completion`, or
            `text`), or a stream of it; its rows are shown as `example`. Without it the
            text that the bank holds is shown, if any.
        verify_dataset (per call, `bool` or `int`, defaults to `True`): compare all rows of `dataset` with the bank's
            hashes; only so many rows, spread evenly (the first of a stream); or none, for another form of the training
            set, row by row in the same order.
        top_k (per call, `int`, defaults to 5): most proponents, and most opponents, to return. With 0 only sources are
            scored.
        budget (per call, `int`, `"adaptive"` or `"all"`, *optional*): forward passes for finding the best rows. A
            number ranks all rows by a predicted gradient, a quarter of the passes corrects the ranking, and the
            others compute scores of the best rows, one each; `adaptive` does so until no other row is likely (two
            standard deviations) to belong to the `top_k` on either side, at most 256; `all` computes all scores, with
            one pass per direction of the bank. By default 128 passes where the bank holds a gradient predictor (and as
            many directions), and `all` otherwise. Sources with directions take one more pass each, and at least
            `top_k` scores on either side are computed.
        generate_kwargs (per call, `dict`, *optional*): more settings of `generate`, such as its own `top_k`.

    Returns:
        An [`AttributionResult`] per input. `examples` come with the highest score first. `row` is the row's position
        in the training set (or its id, if the bank was made with `row_id_column`), `source` and `example` are None
        where they are not known, and `token_scores`, `tokens`, `token_ids` and `offsets` (into `generated_text`) are
        aligned. `tokens` join to `generated_text`, special tokens aside; of a character that is several tokens, the
        first holds it and the others are empty.

    Raises:
        BankError: there is no bank, or it is damaged.
        MismatchError: the bank belongs to another model, or `dataset` is not the one that was trained on.
        QueryError: an input has nothing to score or is too long for the model, or the bank cannot serve the budget.
        ValueError: an unknown option, or an unknown value of one.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _non_generation_params = ("top_k", "budget")

    def __init__(
        self, *args: Any, bank: Any = None, readout: str = "auto", precision: str = "auto",
        allow_mismatch: Sequence[str] = (), **kwargs: Any,
    ):  # fmt: skip
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)
        if isinstance(allow_mismatch, str) or set(allow_mismatch) - {"weights", "tokenizer", "dataset"}:
            raise ValueError(f"allow_mismatch={allow_mismatch!r}: a list of 'weights', 'tokenizer' and 'dataset'")
        self._allowed = tuple(allow_mismatch)
        self.model.eval()
        self.bank = _open_bank(self.model, bank)
        self.scorer = Scorer(
            self.bank, self.model, readout, precision, self._allowed, progress=is_progress_bar_enabled()
        )
        tokenizer = getattr(self.model, "attribution_tokenizer", None)
        if tokenizer is not None and getattr(self.tokenizer, "name_or_path", None) == self.model.name_or_path:
            self.tokenizer: Any = tokenizer  # the user named none, and transformers took the base model's
        if "tokenizer" not in self._allowed:
            self.bank.check_tokenizer(self.tokenizer)
        if self.tokenizer is not None and self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._training_set = TrainingSet(self.bank, self.tokenizer)
        _, forward, postprocess = self._sanitize_parameters(**options)
        self._forward_params |= forward
        self._postprocess_params |= postprocess

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Attribute one input or many; no inputs give no results."""
        if hasattr(inputs, "column_names") or (isinstance(inputs, tuple) and not hasattr(inputs, "_fields")):
            inputs = list(inputs)  # transformers takes lists apart
        if hasattr(inputs, "__len__") and not isinstance(inputs, str | Mapping) and len(inputs) == 0:
            return []  # transformers looks at the first one
        if isinstance(inputs, list) and all(isinstance(value, int) for value in inputs):
            inputs = {"prompt_ids": inputs}  # one input, and not one in each token
        return super().__call__(inputs, *args, **kwargs)

    def scores(self, queries: Sequence[Query], batch_size: int | None = None, budget: Budget = "all") -> Tensor:
        """Return scores of all rows for tokenized queries: (queries, rows); see [`Scorer.scores`]."""
        return self.scorer.scores(queries, check_batch_size(batch_size), budget)

    def source_scores(self, queries: Sequence[Query], batch_size: int | None = None) -> Tensor:
        """Return scores of all sources for tokenized queries: (queries, sources); see [`Scorer.source_scores`]."""
        return self.scorer.source_scores(queries, check_batch_size(batch_size))

    @one_at_a_time
    def _sanitize_parameters(
        self,
        dataset: Any = None,
        top_k: int | None = None,
        verify_dataset: bool | int | None = None,
        budget: Budget = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **generate: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        check_settings(generate, _OPTIONS)
        forward: dict[str, Any] = dict(generate)
        postprocess: dict[str, Any] = {}
        if generate_kwargs is not None:
            if not isinstance(generate_kwargs, Mapping):
                raise ValueError(f"generate_kwargs={generate_kwargs!r}: not a dictionary. Pass {{'top_k': 50}}")
            check_settings(generate_kwargs, ())
            forward["generate_kwargs"] = dict(generate_kwargs)
        if top_k is not None:
            forward["top_k"] = check_top_k(top_k)
        if budget is not None:
            forward["budget"] = self.scorer.resolve_budget(budget)
        if dataset is not None:
            compared = verify_dataset is not False and "dataset" not in self._allowed
            sample = None if verify_dataset is True else verify_dataset
            self._training_set.check(dataset, by_position=not compared or sample is not None)
            order = self._training_set.verify(dataset, sample) if compared else None
            postprocess |= {"dataset": dataset, "order": order}
        return {}, forward, postprocess

    @one_at_a_time
    def preprocess(self, input_: Any) -> dict[str, Tensor]:
        """Return token ids and labels (1, n); the labels are all -100 where the output is to be generated."""
        if self._classifies:
            row = tokenize_text(self.tokenizer, self.model, input_)
            return {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        tokenized = tokenize_input(self.tokenizer, input_)
        if any(label != IGNORED for label in tokenized.labels):
            check_queries([tokenized._asdict()], self.model)
        else:
            check_tokens(tokenized.input_ids, self.model, "the prompt has the token")
        return {
            "input_ids": torch.tensor([tokenized.input_ids]),
            "attention_mask": torch.ones(1, len(tokenized.input_ids), dtype=torch.int64),
            "labels": torch.tensor([tokenized.labels]),
        }

    @one_at_a_time
    def _forward(
        self,
        model_inputs: dict[str, Tensor],
        top_k: int = 5,
        budget: Budget = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **generate: Any,
    ) -> dict[str, Any]:
        given = {**generate, **(generate_kwargs or {})}
        if self._classifies:
            queries = labelled_queries(self.model, self.device, model_inputs, given)
            return {"answer": list(zip(queries, self.scorer.attribute(queries, top_k, budget), strict=True))}
        masks = model_inputs["attention_mask"].bool()
        pairs = [
            (ids[mask], labels[mask])
            for ids, labels, mask in zip(model_inputs["input_ids"], model_inputs["labels"], masks, strict=True)
        ]
        settings = [
            None if bool((labels != IGNORED).any()) else self._generation_settings(len(ids), given)
            for ids, labels in pairs
        ]
        pairs = [
            pair if chosen is None else self._generate(pair[0], chosen)
            for pair, chosen in zip(pairs, settings, strict=True)
        ]
        queries = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in pairs]
        return {"answer": list(zip(queries, self.scorer.attribute(queries, top_k, budget), strict=True))}

    @property
    def _classifies(self) -> bool:
        return self.bank.manifest.objective == "sequence-classification"

    def _generation_settings(self, length: int, given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of `generate` for a prompt of some length, whose output must fit into the context."""
        settings = self._prepare_generate_kwargs(dict(given))
        check_settings({name: settings.get(name) for name in ("num_return_sequences", "generation_config")}, ())
        limit = check_room(self.model, length, settings)
        if settings.get("stop_strings") and settings.get("tokenizer") is None:
            given = {**given, "tokenizer": self.tokenizer}  # generate finds the strings by it
            settings["tokenizer"] = self.tokenizer
        return self._prepare_generate_kwargs(dict(given), **limit) if limit else settings

    def _generate(self, prompt: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return a prompt with its new tokens, and labels; the end-of-text token is kept only if it is alone."""
        text = self.model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)
        text = text if isinstance(text, Tensor) else text.sequences
        if text.shape[0] > 1:
            raise QueryError("num_return_sequences is more than one; ask for one output at a time")
        ids = text[0]
        ends = self._get_set_generation_params(settings).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        ids = ids[:-1] if len(ids) > len(prompt) + 1 and int(ids[-1]) in ends else ids
        return ids, torch.cat([torch.full_like(prompt, IGNORED), ids[len(prompt) :]])

    @one_at_a_time
    def postprocess(
        self, model_outputs: dict[str, Any], dataset: Any = None, order: Sequence[int] | None = None
    ) -> AttributionResult | ClassificationResult:
        """Return the result as plain Python values."""
        # In a batch, transformers takes values out of their lists.
        answer = model_outputs["answer"]
        query, attribution = answer[0] if isinstance(answer, list) else answer
        if self._classifies:
            return {
                "label": class_names(self.model.config)[query["labels"][0]],
                "examples": self._examples(attribution, [0], dataset, order),
                "sources": self._sources(attribution.sources),
            }
        positions = [index for index, label in enumerate(query["labels"]) if label != IGNORED]
        pairs = zip(query["input_ids"], query["labels"], strict=True)
        ids = [token if label == IGNORED else label for token, label in pairs]
        output = output_text(self.tokenizer, ids, positions)
        return {
            "generated_text": output.text,
            "tokens": output.tokens,
            "token_ids": [ids[position] for position in positions],
            "offsets": output.offsets,
            # Position p of token scores belongs to token p + 1 of the text.
            "examples": self._examples(attribution, [position - 1 for position in positions], dataset, order),
            "sources": self._sources(attribution.sources),
        }

    def _examples(
        self, attribution: Attribution, positions: list[int], dataset: Any, order: Sequence[int] | None
    ) -> list[RowScore]:
        """Return the named rows, highest score first."""
        best, worst = attribution.proponents, attribution.opponents
        row_indices = torch.cat([best.row_indices, worst.row_indices]).tolist()
        examples = self._training_set.examples(dataset, row_indices, order) if row_indices else {}
        return [self._row_score(best, index, positions, examples) for index in range(len(best.scores))] + [
            self._row_score(worst, index, positions, examples) for index in reversed(range(len(worst.scores)))
        ]

    def _row_score(self, rows: RankedRows, index: int, positions: list[int], examples: Mapping[int, Any]) -> RowScore:
        source = int(rows.sources[index])
        return {
            "row": int(rows.ids[index]),
            "score": float(rows.scores[index]),
            "std": None if math.isnan(float(rows.stds[index])) else float(rows.stds[index]),
            "exact": bool(rows.exact[index]),
            "token_scores": rows.token_scores[index, positions].tolist(),
            "source": self.bank.manifest.sources[source] if source >= 0 else None,
            "example": examples.get(int(rows.row_indices[index])),
        }

    def _sources(self, scores: Tensor) -> list[SourceScore]:
        """Return every source with its score, highest first."""
        names = self.bank.manifest.sources
        order = torch.argsort(scores, descending=True, stable=True).tolist() if names else []
        return [{"source": names[index], "score": float(scores[index])} for index in order]


def _open_bank(model: Any, bank: Any) -> ResponseBank:
    """Return the given bank, else the one beside the model."""
    source = bank if bank is not None else getattr(model, "attribution_source", None)
    if source is None:
        source = str(getattr(model, "name_or_path", ""))
    if isinstance(source, BankError):
        raise source
    if not isinstance(source, str | Path | ResponseBank):
        raise ValueError(
            f"bank={source!r}: a {type(source).__name__}. Pass a folder, a name on the Hub, or a ResponseBank"
        )
    return source if isinstance(source, ResponseBank) else ResponseBank.from_pretrained(source)


def register() -> None:
    """Make the task known to `transformers.pipeline`; done once, on import of the package."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=TrainingDataAttributionPipeline, pt_model=AutoModelForAttribution, type="text"
        )


register()
