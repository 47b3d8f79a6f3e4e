"""Exact scores of all rows at any number of rows: reverse mode's gradients of queries, walked back through the run.

A score is the inner product of a query's gradient with a row's response. The queries' gradients walk backwards through
the adjoint of each segment, once, and what comes out is multiplied with each row's gradients as they stream: no (N, P)
matrix of responses, and nothing of the bank that is judged. Where gradients were captured, rows' responses are formed
from them instead, some at a time, as the bank forms them: what is judged then is what the bank makes of responses, and
not the captured gradients, which `tests/trainer/test_capture.py` and `lds` judge.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_fwdattr.models.likelihood import Batch, Objective, row_losses
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.response.averaging import query_theta
from hf_fwdattr.response.gradient_stream import GradientStream
from hf_fwdattr.response.passes import Passes, PassSettings
from hf_fwdattr.response.storage import Storage
from hf_fwdattr.trainer.build_context import BuildContext
from hf_fwdattr.trainer.capture import open_captures
from hf_fwdattr.trainer.record import Record, captures_of


__all__ = ["exact_scores", "likelihood_gradients", "recorded_passes"]


def likelihood_gradients(
    model: nn.Module, parameters: TrackedParameters, objective: Objective, batches: Iterable[Batch]
) -> Tensor:
    """Return gradients (batches, P) of each batch's summed log-likelihood by autograd, float64.

    The model is copied and computes in float64.
    """
    double = copy.deepcopy(model).double().eval()
    for parameter in double.parameters():
        parameter.requires_grad_(False)
    live = [tensor.requires_grad_(True) for tensor in parameters.tensors(double)]
    result = []
    for batch in batches:
        logits, labels = objective.forward(double, batch)
        gradients = torch.autograd.grad(-row_losses(logits, labels).sum(), live)
        result.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(result)


def recorded_passes(context: BuildContext, record: Path, storage: Storage) -> Passes:
    """Return the passes over the rows of a recorded run, before any curvature is measured."""
    run = Record.load(record)
    assert run.end is not None, "the run did not end"
    config = context.config
    captures = open_captures(captures_of(record), run)
    segments = run.build(len(context.rows), run.end, config.horizon, captures)
    stream = GradientStream(context.model, context.parameters, context.objective, context.rows, quiet=True)
    settings = PassSettings(averaging=config.averaging, smoothing=run.smoothing, seed=config.seed)
    theta = query_theta(config.averaging, segments, run.end.theta)
    return Passes(stream, segments, theta, storage, settings, captures)


def exact_scores(passes: Passes, gradients: Tensor) -> Tensor:
    """Return the scores of all rows: (queries, rows) nats, float32.

    Rows pass only through the segments that saw them; elsewhere they have no part.

    Args:
        passes (`Passes`): of the run, with their curvature measured.
        gradients (`Tensor`): (queries, P) of the queries' log-likelihoods, at the weights where they are read.
    """
    total, stream = len(passes.trained), passes.stream
    scores = torch.zeros(len(gradients), total)
    if passes.captures is not None:  # each visit decays by itself: responses are formed, some rows at a time
        for rows in torch.arange(total).split(passes.chunk):
            scores[:, rows] = (gradients.double() @ passes.respond(rows).double().T).float()
        return scores
    carried = torch.zeros_like(gradients, dtype=passes.theta.dtype)
    with frozen(stream.model):
        for segment, weight in zip(reversed(passes.segments), reversed(passes.segment_weights), strict=True):
            adjoint, carried = segment.adjoint(carried + weight * gradients.to(carried.dtype))
            seen = segment.row_weights.nonzero().flatten()
            for at, pushes, _ in stream.by_rows(segment.theta, seen, "exact", smoothing=passes.settings.smoothing):
                scores[:, at] += adjoint @ (pushes * segment.row_weights[at].to(pushes.dtype)[:, None]).T
    return scores
