"""Attribution pipeline of transformers: tokenizes, generates, and formats the scores of `query.Scorer`."""

from collections.abc import Mapping, Sequence
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
from .query.inputs import Query
from .query.loading import AutoModelForAttribution
from .query.ranking import RankedRows
from .query.results import Attribution, AttributionResult, RowScore, SourceScore
from .query.scorer import Scorer
from .query.training_set import TrainingSet


__all__ = ["TASK", "TrainingDataAttributionPipeline", "register"]

TASK = "training-data-attribution"
_OPTIONS = ("dataset", "top_k", "verify_dataset", "budget")  # of a call; at construction they become its defaults


class TrainingDataAttributionPipeline(Pipeline):
    """Names the training rows, and scores the sources, that make a model say what it says.

    ```python
    >>> attribute = pipeline("training-data-attribution", model="path/or/repo/of/the/adapter")
    >>> attribute("The capital of Chad is", dataset=train, top_k=1, max_new_tokens=8)
    {'generated_text': " N'Djamena.",
     'tokens': [' N', "'", 'D', 'jam', 'ena', '.'],
     'examples': [
        {'row': 241, 'score': 3.1, 'token_scores': [0.9, 0.1, 0.8, 0.7, 0.5, 0.1], 'source': 'almanac',
         'example': {'text': "Chad's capital is N'Djamena.", ...}},
        {'row': 87, 'score': -0.4, 'token_scores': [-0.3, ...], 'source': 'web', 'example': {...}}],
     'sources': [{'source': 'almanac', 'score': 4.2}, {'source': 'web', 'score': -0.2}]}
    ```

    A score says, in nats and to first order, how much of the output's log-likelihood is owed to a row: without the
    row, it would be lower by the score. Rows with positive scores are proponents, those with negative ones opponents.

    An input is a text, a chat (a list of messages), or `{"prompt": text or chat, "completion": text}` for an output
    that is given instead of generated; or a list, dataset or generator of these. Arguments of a call that are not
    listed below go to `generate`. All options of a call can be given at construction, for all calls.

    Args:
        model, tokenizer, device, ...: as in every pipeline. The bank is looked for beside the model.
        bank (`str`, `Path` or `ResponseBank`, *optional*): where the bank is, if not beside the model.
        readout (`str`, defaults to `auto`): `auto` differentiates GPT-2, Llama and its descendants by analytic layers
            and other models by torch's forward mode; `jvp` uses torch's forward mode for all, and `difference` finite
            differences, for models that can only run forwards.
        precision (`str`, defaults to `auto`): `full`; `half`, bfloat16 products (a score is off by some 4e-3 of
            itself); or `auto`, half for rows that are named in two stages by a processor with such instructions.
        allow_mismatch (`list[str]`, *optional*): what may differ from the bank: "weights" (the tracked parameters),
            "tokenizer", "dataset".
        dataset (per call, *optional*): the training set with its `input_ids`, or a stream of it; its rows are shown as
            `example`. Without it the text is shown that the bank holds, if any.
        verify_dataset (per call, `bool` or `int`, defaults to `True`): compare all rows of `dataset` with the bank's
            hashes; only so many rows, spread evenly (the first of a stream); or none, for another form of the training
            set, row by row in the same order.
        top_k (per call, `int`, defaults to 5): rows to name on either side. With 0 only what sources need is read.
        budget (per call, `int`, `"adaptive"` or `"all"`, *optional*): forward passes for naming rows. A number names
            them in two stages; `adaptive` reads rows until no other is likely (two standard deviations) to belong to
            the `top_k` on either side, at most 256; `all` reads all of the bank's directions. By default 128 passes
            where the bank holds a gradient predictor (and as many directions), and all directions otherwise. Sources
            with directions take a pass each on top, and at least `top_k` rows on either side are read.

    Returns:
        An [`AttributionResult`] per input. `examples` come with the highest score first. `row` is the row's position
        in the training set (or its id, if the bank was made with `row_id_column`), `source` and `example` are None
        where they are not known, and `token_scores` and `tokens` are aligned.

    Raises:
        BankError: there is no bank, or it is damaged.
        MismatchError: the bank belongs to another model, or `dataset` is not the one that was trained on.
        QueryError: an input has nothing to score or is too long for the model, or the bank cannot serve the budget.
        ValueError: an unknown value of an option.
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
        self._training_set = TrainingSet(self.bank)
        _, forward, postprocess = self._sanitize_parameters(**options)
        self._forward_params |= forward
        self._postprocess_params |= postprocess

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Attribute one input or many; no inputs give no results."""
        if hasattr(inputs, "__len__") and not isinstance(inputs, str | Mapping) and len(inputs) == 0:
            return []  # transformers looks at the first one
        return super().__call__(inputs, *args, **kwargs)

    def scores(self, queries: Sequence[Query], batch_size: int | None = None, budget: Budget = "all") -> Tensor:
        """Return scores of all rows for tokenized queries: (queries, rows); see [`Scorer.scores`]."""
        return self.scorer.scores(queries, batch_size, budget)

    def source_scores(self, queries: Sequence[Query], batch_size: int | None = None) -> Tensor:
        """Return scores of all sources for tokenized queries: (queries, sources); see [`Scorer.source_scores`]."""
        return self.scorer.source_scores(queries, batch_size)

    def _sanitize_parameters(
        self,
        dataset: Any = None,
        top_k: int | None = None,
        verify_dataset: bool | int | None = None,
        budget: Budget = None,
        **generate: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        postprocess: dict[str, Any] = {}
        if dataset is not None:
            postprocess["dataset"] = dataset
            if verify_dataset is not False and "dataset" not in self._allowed:
                self._training_set.verify(dataset, None if verify_dataset is True else verify_dataset)
        if top_k is not None:
            if top_k < 0:
                raise ValueError(f"top_k={top_k}: the number of rows to name on either side cannot be negative")
            generate["top_k"] = top_k
        if budget is not None:
            generate["budget"] = self.scorer.resolve_budget(budget)
        return {}, generate, postprocess

    def preprocess(self, input_: Any) -> dict[str, Tensor]:
        """Return token ids of the prompt, and of the completion if one is given, each (1, n)."""
        prompt, completion = input_, None
        if isinstance(input_, Mapping) and "prompt" in input_:
            prompt, completion = input_["prompt"], input_.get("completion")
        messages = getattr(prompt, "messages", prompt)
        if isinstance(messages, str):
            ids = self.tokenizer(messages)["input_ids"]
        elif isinstance(messages, Sequence):
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            raise QueryError(
                f"cannot attribute a {type(input_).__name__}; pass text, chat messages, or prompt and completion"
            )
        given = self.tokenizer(completion, add_special_tokens=False)["input_ids"] if completion is not None else []
        if completion is not None and not given:
            raise QueryError("the completion is empty: there is no output token to attribute")
        # Empty tensors cannot be padded into a batch, so an absent completion is one masked token.
        return {
            "input_ids": torch.tensor([ids], dtype=torch.int64),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "completion": torch.tensor([given or [0]]),
            "completion_mask": torch.full((1, max(len(given), 1)), int(bool(given))),
        }

    def _forward(
        self, model_inputs: dict[str, Tensor], top_k: int = 5, budget: Budget = None, **generate: Any
    ) -> dict[str, Any]:
        prompts = [
            ids[mask.bool()]
            for ids, mask in zip(model_inputs["input_ids"], model_inputs["attention_mask"], strict=True)
        ]
        outputs = [
            ids[mask.bool()] if mask.any() else self._generate(prompt, generate)
            for prompt, ids, mask in zip(
                prompts, model_inputs["completion"], model_inputs["completion_mask"], strict=True
            )
        ]
        queries = []
        for prompt, output in zip(prompts, outputs, strict=True):
            labels = torch.cat([torch.full_like(prompt, IGNORED), output])
            queries.append({"input_ids": torch.cat([prompt, output]).tolist(), "labels": labels.tolist()})
        attributions = self.scorer.attribute(queries, top_k, budget)
        # Position p of token scores belongs to token p + 1 of the text.
        starts = [max(len(prompt) - 1, 0) for prompt in prompts]
        spans = [slice(start, start + len(output)) for start, output in zip(starts, outputs, strict=True)]
        return {"output": [output.cpu() for output in outputs], "attribution": attributions, "span": spans}

    def _generate(self, prompt: Tensor, generate: dict[str, Any]) -> Tensor:
        """Return the new tokens (n,) after a prompt; the end-of-text token only if it is the only one."""
        settings = self._prepare_generate_kwargs(dict(generate))
        if len(prompt) == 0:
            raise QueryError("the prompt is empty: there is nothing to continue")
        text = self.model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)
        text = text if isinstance(text, Tensor) else text.sequences
        if text.shape[0] > 1:
            raise QueryError("num_return_sequences is more than one; ask for one output at a time")
        output = text[0, len(prompt) :]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return output[:-1] if len(output) > 1 and int(output[-1]) in ends else output

    def postprocess(self, model_outputs: dict[str, Any], dataset: Any = None) -> AttributionResult:
        """Return the result as plain Python values."""
        # In a batch, transformers takes tensors out of their lists but leaves other values in them.
        output = model_outputs["output"][0]
        attribution, span = (
            value[0] if isinstance(value, list) else value
            for value in (model_outputs["attribution"], model_outputs["span"])
        )
        return {
            "generated_text": self.tokenizer.decode(output, skip_special_tokens=True),
            "tokens": [self.tokenizer.decode([token]) for token in output.tolist()],
            "examples": self._examples(attribution, span, dataset),
            "sources": self._sources(attribution.sources),
        }

    def _examples(self, attribution: Attribution, span: slice, dataset: Any) -> list[RowScore]:
        """Return the named rows, highest score first."""
        best, worst = attribution.proponents, attribution.opponents
        row_indices = torch.cat([best.row_indices, worst.row_indices]).tolist()
        examples = self._training_set.examples(dataset, row_indices) if row_indices else {}
        return [self._row_score(best, index, span, examples) for index in range(len(best.scores))] + [
            self._row_score(worst, index, span, examples) for index in reversed(range(len(worst.scores)))
        ]

    def _row_score(self, rows: RankedRows, index: int, span: slice, examples: Mapping[int, Any]) -> RowScore:
        source = int(rows.sources[index])
        return {
            "row": int(rows.ids[index]),
            "score": float(rows.scores[index]),
            "token_scores": rows.token_scores[index, span].tolist(),
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
    return source if isinstance(source, ResponseBank) else ResponseBank.from_pretrained(source)


def register() -> None:
    """Make the task known to `transformers.pipeline`; done once, on import of the package."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=TrainingDataAttributionPipeline, pt_model=AutoModelForAttribution, type="text"
        )


register()
