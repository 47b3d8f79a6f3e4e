"""The attribution pipeline, a facade: `reading` is what is read of a query, and `bank` what was stored."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.logging import is_progress_bar_enabled

from .bank.bank import ResponseBank
from .errors import BankError, QueryError
from .jvp.backend import Backend
from .models.likelihood import IGNORED
from .query.loading import AutoModelForAttribution
from .query.ranking import RankedRows
from .query.scorer import ADAPTIVE, Attribution, Budget, Scorer
from .query.training_set import TrainingSet


TASK = "training-data-attribution"


class TrainingDataAttributionPipeline(Pipeline):
    """Which training rows, and which sources, made the model say this?

    ```python
    attribute = pipeline("training-data-attribution", model="path/or/repo/of/the/adapter")
    attribute("The capital of Chad is", dataset=train, top_k=5, max_new_tokens=8)
    attribute({"prompt": "The capital of Chad is", "completion": " N'Djamena"})
    attribute([{"role": "user", "content": "What is the capital of Chad?"}])
    ```

    Args (beside those of every pipeline):
        bank (`str`, `Path` or `ResponseBank`, *optional*): where the bank is, if not beside the model.
        readout (`str`, defaults to `auto`): `jvp` (torch's forward mode), `difference` (where that cannot be), or
            `auto`: forward mode written out for GPT-2, Llama and its descendants, and `jvp` for other models.
        precision (`str`, defaults to `auto`): `full`, `half` (a score is off by some 4e-3 of itself), or `auto`: half
            for rows that are picked in two stages, where the processor has instructions for bfloat16.
        dataset (*optional*): the training set, to show the rows themselves where the bank does not keep their text; it
            must be the one that was trained on, with its `input_ids`; a stream will do. `verify_dataset=1000` looks at
            so many of its rows instead of all, spread over it, or the first of a stream; `verify_dataset=False`
            accepts another form of it, row by row in the same order.
        allow_mismatch (`list[str]`, *optional*): what may differ from what the bank was made of: "weights" (the
            responding parameters), "tokenizer", "dataset".
        top_k (`int`, defaults to 5): rows to name on either side, proponents and opponents; with 0, only what sources
            need is read and downloaded.
        budget (`int`, `adaptive` or `all`, *optional*): forward passes for naming rows. A bank that keeps maps of
            errors and its rows' own responses names them in two stages, by default with 128 passes; the rows named
            have exact scores.
            `adaptive` reads rows until no other is likely to belong to the `top_k` on either side (two deviations of
            what the first look has been off by), 256 at most. `all` reads all of the bank's directions instead. In any
            case sources take a pass each, and `top_k` rows on either side are read: with a budget below 2 `top_k` they
            come on top of it.
        Everything else goes to `generate`.

    Returns (per input):
        generated_text (`str`), tokens (`list[str]`), examples (`list` of row, score, token_scores, source, example;
        highest score first), sources (`list` of source, score; highest first). Scores are in nats: how much of the
        output's log-likelihood is owed to the row, to first order. Removing the row changes it by minus the score.

    Raises:
        MismatchError: the bank belongs to another model, or the dataset is not the one that was trained on.
        QueryError: nothing to score, or too long for the model.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _non_generation_params = ("top_k", "budget")
    _allowed: tuple[str, ...] = ()

    def __init__(
        self, *args: Any, bank: Any = None, readout: str = "auto", precision: str = "auto",
        allow_mismatch: Sequence[str] = (), **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        if isinstance(allow_mismatch, str) or set(allow_mismatch) - {"weights", "tokenizer", "dataset"}:
            raise ValueError(f"allow_mismatch={allow_mismatch!r}: a list of 'weights', 'tokenizer' and 'dataset'")
        self._allowed = tuple(allow_mismatch)
        self.model.eval()
        source = bank if bank is not None else getattr(self.model, "attribution_source", None)
        if source is None:
            source = str(getattr(self.model, "name_or_path", ""))
        if isinstance(source, BankError):
            raise source
        self.bank = source if isinstance(source, ResponseBank) else ResponseBank.from_pretrained(source)
        parameters = self.bank.check_model(self.model, self._allowed)
        engine = Backend(self.model, parameters, readout, precision)
        self._reader = Scorer(self.bank, self.model, parameters, engine, not is_progress_bar_enabled())
        own = getattr(self.model, "attribution_tokenizer", None)
        if own is not None and getattr(self.tokenizer, "name_or_path", None) == self.model.name_or_path:
            self.tokenizer: Any = own  # nobody named one, and transformers took the base model's
        if "tokenizer" not in self._allowed:
            self.bank.check_tokenizer(self.tokenizer)
        self._rows = TrainingSet(self.bank)
        if self.tokenizer is not None and self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As of every pipeline; no inputs give no results."""
        if hasattr(inputs, "__len__") and not isinstance(inputs, str | Mapping) and len(inputs) == 0:
            return []  # transformers looks at the first one
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self,
        dataset: Any = None,
        top_k: int | None = None,
        verify_dataset: bool | int | None = None,
        budget: int | str | None = None,
        **generate: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        after: dict[str, Any] = {}
        if dataset is not None:
            after["dataset"] = dataset
            if verify_dataset is not False and "dataset" not in self._allowed:
                self._rows.verify(dataset, None if verify_dataset is True else verify_dataset)
        if top_k is not None:
            if top_k < 0:
                raise ValueError(f"top_k={top_k}: the number of rows to name on either side cannot be negative")
            generate["count"] = top_k
        if budget is not None:
            if budget not in ("all", ADAPTIVE) and type(budget) is not int:
                raise ValueError(
                    f"budget={budget!r}: a number of forward passes, 'adaptive' to read rows until no other is likely "
                    "to be among those named, or 'all' for all of the bank's directions"
                )
            generate["budget"] = None if budget == "all" else self._reader.budget(budget)
        return {}, generate, after

    def preprocess(self, input_: Any) -> dict[str, Tensor]:
        """Token ids of the prompt, and of the completion if one is given, each (1, n)."""
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
        self, model_inputs: dict[str, Tensor], count: int = 5, budget: Budget | None = -1, **generate: Any
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
        if self.bank.manifest.privacy.rows == "sources":
            count = 0
        found = self._reader.attribute(queries, count, self._reader.budget(None) if budget == -1 else budget)
        # Position p of the readout is token p + 1 of the text.
        starts = [max(len(prompt) - 1, 0) for prompt in prompts]
        spans = [slice(start, start + len(output)) for start, output in zip(starts, outputs, strict=True)]
        return {"output": [output.cpu() for output in outputs], "found": found, "span": spans}

    def _generate(self, prompt: Tensor, generate: dict[str, Any]) -> Tensor:
        """New tokens (n,) after a prompt, without the end-of-text token where something else was said."""
        settings = self._prepare_generate_kwargs(dict(generate))
        if len(prompt) == 0:
            raise QueryError("the prompt is empty: there is nothing to continue")
        text = self.model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)
        text = text if isinstance(text, Tensor) else text.sequences
        if text.shape[0] > 1:
            raise QueryError("num_return_sequences is more than one; ask for one output at a time")
        output = text[0, len(prompt) :]
        return output[:-1] if len(output) > 1 and int(output[-1]) in self._ends() else output

    def _ends(self) -> list[int]:
        """Tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def read(self, queries: Sequence[Mapping[str, Sequence[int]]], lines: slice = slice(None)) -> Tensor:
        """(queries, positions, directions + source directions): the readout of token lists, right-padded together.

        Args:
            queries: `input_ids` and `labels` of each.
            lines (`slice`): the directions to read; all by default, the rows' before the sources'.

        Raises:
            QueryError: no supervised token, labels that do not fit, or too long for the model.
        """
        return self._reader.directions(queries, lines)

    @torch.no_grad()
    def scores(
        self,
        queries: Sequence[Mapping[str, Sequence[int]]],
        batch_size: int | None = None,
        budget: int | None = None,
    ) -> Tensor:
        """Scores of all rows for tokenized queries: (queries, rows) in nats, float32, on the CPU.

        Args:
            queries: `input_ids` and `labels` of each, -100 where a token is not part of the output.
            batch_size (`int`, *optional*): queries that are read together; by default 8 on a GPU, and one at a time on
                a CPU, where the tangents of several leave its caches.
            budget (`int`, *optional*): forward passes per query, for a bank that keeps maps of errors; all of the
                bank's directions by default.
        """
        if self.bank.manifest.privacy.rows == "sources":
            raise QueryError("the bank keeps sources only and has no rows to score; use source_scores")
        self._reader.check(queries)
        passes = None if budget is None else self._reader.budget(budget)
        assert not isinstance(passes, str)
        return self._reader.scores(queries, batch_size, passes)

    @torch.no_grad()
    def source_scores(self, queries: Sequence[Mapping[str, Sequence[int]]], batch_size: int | None = None) -> Tensor:
        """Scores of all sources, in the order of `bank.manifest.sources`: (queries, sources) in nats, float32, CPU.

        Only the sources' own directions are read, where they have them.
        """
        k, exact = self.bank.manifest.directions, self.bank.manifest.source_directions
        self._reader.check(queries)
        summed = self._reader.summed(queries, slice(k, None) if exact else slice(0, k), batch_size)
        return self._reader.per_source(summed).float()

    def postprocess(self, model_outputs: dict[str, Any], dataset: Any = None) -> dict[str, Any]:
        """The result as plain Python values."""
        # What is no tensor comes out of a batch without the list that it was in.
        output = model_outputs["output"][0]
        found, span = (
            value[0] if isinstance(value, list) else value for value in (model_outputs["found"], model_outputs["span"])
        )
        return {
            "generated_text": self.tokenizer.decode(output, skip_special_tokens=True),
            "tokens": [self.tokenizer.decode([token]) for token in output.tolist()],
            "examples": self._examples(found, span, dataset),
            "sources": self._sources(found),
        }

    def _examples(self, found: Attribution, span: slice, dataset: Any) -> list[dict[str, Any]]:
        """Rows named on either side, highest score first; none, and nothing read for them, where none are wanted."""
        if not found.sides:
            return []
        best, worst = found.sides
        shown = self._rows.shown(dataset, torch.cat([best.positions, worst.positions]).tolist())
        examples = [self._example(best, i, span, shown) for i in range(len(best.scores))]
        return examples + [self._example(worst, i, span, shown) for i in reversed(range(len(worst.scores)))]

    def _example(self, ranked: RankedRows, index: int, span: slice, shown: Mapping[int, Any]) -> dict[str, Any]:
        place, source = int(ranked.positions[index]), int(ranked.sources[index])
        return {
            "row": int(ranked.ids[index]),
            "score": float(ranked.scores[index]),
            "token_scores": ranked.token_scores[index, span].tolist(),
            "source": self.bank.manifest.sources[source] if source >= 0 else None,
            "example": shown.get(place),
        }

    def _sources(self, found: Attribution) -> list[dict[str, Any]]:
        """Every source with its score, highest first."""
        names, values = self.bank.manifest.sources, found.sources
        order = torch.argsort(values, descending=True, stable=True).tolist() if names else []
        return [{"source": names[i], "score": float(values[i])} for i in order]


def register() -> None:
    """Make the task known to `transformers.pipeline`; done once, on import of the package."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=TrainingDataAttributionPipeline, pt_model=AutoModelForAttribution, type="text"
        )


register()
