"""The attribution pipeline: generate (or take) an output, and say which rows and sources made it likely.

A facade: the work is done by `readout` (forward passes along the probes) and `bank` (what was stored).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .bank.bank import ResponseBank
from .errors import BankError, QueryError
from .loading import AutoModelForAttribution
from .objective import CAUSAL_LM, IGNORED
from .readout import READOUTS
from .readout.ranking import Ranked, rank, scores, source_coordinates
from .training_set import TrainingSet


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
        readout (`str`, defaults to `jvp`): `jvp` or `difference`.
        dataset (*optional*): the training set, to show the rows themselves where the bank does not keep their text; it
            must be the one that was trained on, with its `input_ids`; a stream will do. `verify_dataset=1000` looks at
            so many of its rows instead of all, spread over it, or the first of a stream; `verify_dataset=False`
            accepts another form of it, row by row in the same order.
        allow_mismatch (`list[str]`, *optional*): what may differ from what the bank was made of: "weights" (the
            responding parameters), "tokenizer", "dataset".
        top_k (`int`, defaults to 5): rows to name on either side, proponents and opponents; with 0, only what sources
            need is read and downloaded.
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
    _non_generation_params = ("top_k",)
    _allowed: tuple[str, ...] = ()

    def __init__(
        self, *args: Any, bank: Any = None, readout: str = "jvp", allow_mismatch: Sequence[str] = (), **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        if readout not in READOUTS:
            raise ValueError(f"readout={readout!r}: one of {', '.join(READOUTS)}")
        unknown = sorted(set(allow_mismatch) - {"weights", "tokenizer", "dataset"})
        if isinstance(allow_mismatch, str) or unknown:
            raise ValueError(f"allow_mismatch={allow_mismatch!r}: a list of 'weights', 'tokenizer' and 'dataset'")
        self._read, self._allowed = READOUTS[readout], tuple(allow_mismatch)
        self.model.eval()
        source = bank if bank is not None else getattr(self.model, "attribution_source", None)
        if source is None:
            source = str(getattr(self.model, "name_or_path", ""))
        if isinstance(source, BankError):
            raise source
        self.bank = source if isinstance(source, ResponseBank) else ResponseBank.from_pretrained(source)
        self._parameters = self.bank.check_model(self.model, self._allowed)
        own = getattr(self.model, "attribution_tokenizer", None)
        if own is not None and getattr(self.tokenizer, "name_or_path", None) == self.model.name_or_path:
            self.tokenizer: Any = own  # nobody named one, and transformers took the base model's
        if "tokenizer" not in self._allowed:
            self.bank.check_tokenizer(self.tokenizer)
        self._rows = TrainingSet(self.bank)
        self._held: tuple[int, Tensor] | None = None
        if self.tokenizer is not None and self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _sanitize_parameters(
        self, dataset: Any = None, top_k: int | None = None, verify_dataset: bool | int | None = None, **generate: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        after: dict[str, Any] = {}
        if dataset is not None:
            after["dataset"] = dataset
            if verify_dataset is not False and "dataset" not in self._allowed:
                self._rows.verify(dataset, None if verify_dataset is True else verify_dataset)
        if top_k is not None:
            if top_k < 0:
                raise ValueError(f"top_k={top_k}: the number of rows to name on either side cannot be negative")
            after["top_k"] = top_k
            generate["name_rows"] = top_k > 0
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

    def _forward(self, model_inputs: dict[str, Tensor], name_rows: bool = True, **generate: Any) -> dict[str, Any]:
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
        manifest = self.bank.manifest
        named = (name_rows and manifest.privacy.rows != "sources") or not manifest.source_probes
        read = self.read(queries, slice(0 if named else manifest.probes, None))
        # Position p of the readout is token p + 1 of the text.
        starts = [max(len(prompt) - 1, 0) for prompt in prompts]
        parts = [line[start : start + len(o)] for line, start, o in zip(read, starts, outputs, strict=True)]
        return {"output": [o.cpu() for o in outputs], "readout": parts}

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
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return output[:-1] if len(output) > 1 and int(output[-1]) in ends else output

    def read(self, queries: Sequence[Mapping[str, Sequence[int]]], lines: slice = slice(None)) -> Tensor:
        """(queries, positions, probes + source probes): the readout of token lists, right-padded together.

        Args:
            queries: `input_ids` and `labels` of each.
            lines (`slice`): the probes to read; all by default, the rows' before the sources'.

        Raises:
            QueryError: no supervised token, labels that do not fit, or too long for the model.
        """
        self._check(queries)
        width = max(len(query["input_ids"]) for query in queries)

        def padded(key: str, fill: int) -> Tensor:
            lines = [list(query[key]) + [fill] * (width - len(query[key])) for query in queries]
            return torch.tensor(lines, device=self.device)

        real = [[1] * len(query["input_ids"]) + [0] * (width - len(query["input_ids"])) for query in queries]
        batch = {
            "input_ids": padded("input_ids", 0),
            "attention_mask": torch.tensor(real, device=self.device),
            "labels": padded("labels", IGNORED),
        }
        return self._read(self.model, self._parameters, CAUSAL_LM, batch, self._probes(lines))

    def _probes(self, lines: slice) -> Tensor:
        """(lines, P) on the model's device, read from the bank when they are first asked for, and kept."""
        manifest = self.bank.manifest
        start, end, _ = lines.indices(manifest.probes + manifest.source_probes)
        first, held = self._held or (start, None)
        if held is None or not first <= start <= end <= first + len(held):
            last = end if held is None else max(end, first + len(held))
            first = min(start, first)
            held = self.bank.probes(lines=slice(first, last)).to(self.device)
            self._held = first, held
        return held[start - first : end - first]

    def _check(self, queries: Sequence[Mapping[str, Sequence[int]]]) -> None:
        settings = self.model.config
        longest, known = getattr(settings, "max_position_embeddings", None), getattr(settings, "vocab_size", None)
        if not queries:
            raise QueryError("there are no queries to score")
        for number, query in enumerate(queries):
            ids, labels = query["input_ids"], query["labels"]
            if len(ids) != len(labels):
                raise QueryError(
                    f"query {number} has {len(ids)} input_ids and {len(labels)} labels; one label per token"
                )
            if not any(label != IGNORED for label in labels[1:]):
                raise QueryError(
                    f"query {number} has no supervised token (all labels are -100, or only its first token)"
                )
            if longest is not None and len(ids) > longest:
                raise QueryError(
                    f"query {number} has {len(ids)} tokens and the model reads at most {longest}; shorten it"
                )
            for what, values in (("token", ids), ("label", [label for label in labels if label != IGNORED])):
                strange = [v for v in values if v < 0 or (known is not None and v >= known)]
                if strange:
                    raise QueryError(f"query {number} has the {what} {strange[0]}, which is not in the vocabulary")

    @torch.no_grad()
    def scores(self, queries: Sequence[Mapping[str, Sequence[int]]], batch_size: int | None = None) -> Tensor:
        """Scores of all rows for tokenized queries: (queries, rows) in nats, float32, on the CPU.

        Args:
            queries: `input_ids` and `labels` of each, -100 where a token is not part of the output.
            batch_size (`int`, *optional*): queries that are read together; by default 8 on a GPU, and one at a time on
                a CPU, where the tangents of several leave its caches.
        """
        if self.bank.manifest.privacy.rows == "sources":
            raise QueryError("the bank keeps sources only and has no rows to score; use source_scores")
        summed = self._summed(queries, slice(0, self.bank.manifest.probes), batch_size)
        return scores(summed[:, None], self.bank.coordinates())

    @torch.no_grad()
    def source_scores(self, queries: Sequence[Mapping[str, Sequence[int]]], batch_size: int | None = None) -> Tensor:
        """Scores of all sources, in the order of `bank.manifest.sources`: (queries, sources) in nats, float32, CPU.

        Only the sources' own probes are read, where they have them.
        """
        k, exact = self.bank.manifest.probes, self.bank.manifest.source_probes
        summed = self._summed(queries, slice(k, None) if exact else slice(0, k), batch_size)
        return self._per_source(summed).float()

    def _summed(self, queries: Sequence[Mapping[str, Sequence[int]]], lines: slice, batch_size: int | None) -> Tensor:
        """(queries, probes in `lines`): readouts summed over output tokens, float64, on the CPU."""
        self._check(queries)
        step = batch_size or (8 if self.device.type == "cuda" else 1)
        parts = [self.read(queries[at : at + step], lines).double().sum(1) for at in range(0, len(queries), step)]
        return torch.cat(parts).cpu()

    def _per_source(self, summed: Tensor) -> Tensor:
        """(queries, sources): exact where sources have probes, else from the sum of their rows' coordinates."""
        manifest = self.bank.manifest
        if manifest.source_probes:
            return summed * torch.tensor(manifest.source_scales, dtype=torch.float64)
        return summed @ source_coordinates(self.bank.coordinates(), len(manifest.sources)).T

    def postprocess(self, model_outputs: dict[str, Any], dataset: Any = None, top_k: int = 5) -> dict[str, Any]:
        """The result as plain Python values."""
        output, readout = model_outputs["output"][0], model_outputs["readout"][0]
        return {
            "generated_text": self.tokenizer.decode(output, skip_special_tokens=True),
            "tokens": [self.tokenizer.decode([token]) for token in output.tolist()],
            "examples": self._examples(readout, dataset, top_k),
            "sources": self._sources(readout),
        }

    def _examples(self, readout: Tensor, dataset: Any, top_k: int) -> list[dict[str, Any]]:
        """Rows named on either side, best first; none, and nothing read for them, where none are wanted."""
        if top_k == 0 or self.bank.manifest.privacy.rows == "sources":
            return []
        ((best, worst),) = rank(readout[None, :, : self.bank.manifest.probes], self.bank.coordinates(), top_k)
        shown = self._rows.shown(dataset, torch.cat([best.positions, worst.positions]).tolist())
        examples = [self._example(best, i, shown) for i in range(len(best.scores))]
        return examples + [self._example(worst, i, shown) for i in reversed(range(len(worst.scores)))]

    def _example(self, ranked: Ranked, index: int, shown: Mapping[int, Any]) -> dict[str, Any]:
        place, source = int(ranked.positions[index]), int(ranked.sources[index])
        return {
            "row": int(ranked.ids[index]),
            "score": float(ranked.scores[index]),
            "token_scores": ranked.token_scores[index].tolist(),
            "source": self.bank.manifest.sources[source] if source >= 0 else None,
            "example": shown.get(place),
        }

    def _sources(self, readout: Tensor) -> list[dict[str, Any]]:
        """Every source with its score, highest first, from (positions, probes) of which theirs come last."""
        manifest = self.bank.manifest
        if not manifest.sources:
            return []
        summed = readout.double().sum(0, keepdim=True).cpu()
        values = self._per_source(summed[:, -manifest.source_probes :])[0]  # all of them, where sources have none
        order = torch.argsort(values, descending=True, stable=True).tolist()
        return [{"source": manifest.sources[i], "score": float(values[i])} for i in order]


def register() -> None:
    """Make the task known to `transformers.pipeline`; done once, on import of the package."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=TrainingDataAttributionPipeline, pt_model=AutoModelForAttribution, type="text"
        )


register()
