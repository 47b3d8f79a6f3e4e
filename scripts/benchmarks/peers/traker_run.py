"""TRAK with traker, in its own environment: python peers/traker_run.py FOLDER.

The library has no model output for language models; this one is the paper's: the sum of the tokens' log-odds.
"""

import logging
import sys
import tempfile

import torch
from exchange import Exchange, Result, hand_in, seconds
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput


class LanguageModelOutput(AbstractModelOutput):
    """f = sum over supervised tokens of log(p / (1 - p)); dloss/df = mean of 1 - p."""

    def __init__(self):
        super().__init__()

    @staticmethod
    def _token_log_probabilities(model, weights, buffers, tokens, labels):
        """Return log-probabilities (rows, length - 1), and which tokens are supervised."""
        logits = torch.func.functional_call(model, (weights, buffers), args=(), kwargs={"input_ids": tokens}).logits
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        return log_p, labels[:, 1:] != -100

    @staticmethod
    def get_output(model, weights, buffers, tokens, labels):
        log_p, asked = LanguageModelOutput._token_log_probabilities(
            model, weights, buffers, tokens.unsqueeze(0), labels.unsqueeze(0)
        )
        return ((log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))) * asked).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        log_p, asked = self._token_log_probabilities(model, weights, buffers, *batch)
        return (((1 - log_p.exp()) * asked).sum(1, keepdim=True) / asked.sum(1, keepdim=True)).detach()


def trak(exchange, models, dimension, ridge, half=False):
    """Score by TRAK averaged over models, as in the library's quick start."""
    model = exchange.model(0, only_adapter=True)
    states = [exchange.model(i, only_adapter=True).state_dict() for i in range(models)]
    with tempfile.TemporaryDirectory() as scratch:
        traker = TRAKer(
            model=model, task=LanguageModelOutput(), train_set_size=len(exchange.rows), save_dir=scratch,
            device="cpu", proj_dim=dimension, use_half_precision=half, lambda_reg=ridge, logging_level=logging.ERROR,
        )  # fmt: skip
        began = seconds()
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for batch in zip(exchange.rows.split(16), exchange.row_labels.split(16), strict=True):
                traker.featurize(batch=list(batch), num_samples=len(batch[0]))
        traker.finalize_features()
        built = seconds()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("queries", state, model_id=number, num_targets=len(exchange.queries))
            for batch in zip(exchange.queries.split(8), exchange.query_labels.split(8), strict=True):
                traker.score(batch=list(batch), num_samples=len(batch[0]))
        scores = torch.tensor(traker.finalize_scores("queries").astype("float32")).T
        asked = seconds() - built
    return Result(scores, built - began, asked, models * dimension * (2 if half else 4))


def main():
    exchange = Exchange(sys.argv[1], sys.argv[2:])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    common = dict(peer="traker 0.3.2", method="TRAK", backward="query")
    hand_in(exchange, "traker-shipped", lambda: trak(exchange, 1, 2048, 0.0, half=True), models=1, shipped=True,
            setting="2048 dimensions, float16, no ridge", **common)  # fmt: skip
    for models, dimension, ridge in (
        *((1, 2048, ridge) for ridge in (0.0, 1e-3, 1e-1, 1e1, 1e3, 1e4)),
        *((5, 2048, ridge) for ridge in (0.0, 1e-1, 1e3)),
    ):
        hand_in(
            exchange, f"traker-{models}-{dimension}-{ridge:g}",
            lambda m=models, d=dimension, r=ridge: trak(exchange, m, d, r), models=models,
            setting=f"{dimension} dimensions, float32, ridge {ridge:g}", **common,
        )  # fmt: skip


if __name__ == "__main__":
    main()
