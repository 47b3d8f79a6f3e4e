"""Readout by forward-mode derivatives: the model is run once, and many directions' tangents ride along in one batch.

For each direction u_j, query and output token: d/dh log p(token; theta + h u_j) at h = 0, in nats per unit of the direction's
coordinate. No graph is kept and nothing runs backwards, so this works under `torch.no_grad`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import NumericalError, UnsupportedError
from ..models.compat import fused_activations, refuse_inactive_adapters, refuse_silent_jvp
from ..models.likelihood import Batch, Likelihood, Objective, log_probabilities
from ..models.output_head import Hidden, hidden_state_gradients, hidden_states, output_layer
from ..models.parameters import Parameters
from .chunking import directions_per_chunk, unit


@torch.no_grad()
def read(
    model: nn.Module,
    parameters: Parameters,
    objective: Objective,
    batch: Batch,
    directions: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Directional derivatives of the log-likelihood of a batch of queries.

    Args:
        model (`nn.Module`): in evaluation mode.
        batch (`Mapping`): tensors (queries, positions), right-padded, with `labels` that are -100 outside the output.
        directions (`Tensor`): (k, P) directions.
        chunk (`int`, *optional*): directions in flight; as many as fit the memory by default.

    Returns:
        (queries, positions, k), zero where a position is not supervised; float32 (float64 for float64 models).

    Raises:
        UnsupportedError: the model is in training mode, or under `torch.inference_mode`, or cannot be differentiated
            (or, as with bitsandbytes, would be differentiated wrongly).
        NumericalError: a derivative that is not finite.
    """
    if torch.is_inference_mode_enabled():
        raise UnsupportedError("torch.inference_mode drops derivatives without a word; use torch.no_grad instead")
    if any(module.training for module in model.modules()):
        raise UnsupportedError("the model is in training mode, where dropout is random; call model.eval()")
    refuse_silent_jvp(model)
    refuse_inactive_adapters(model, parameters.live)
    weights = dict(zip(parameters.live, (p.detach() for p in parameters.tensors(model)), strict=True))
    likelihood = Likelihood(model, objective)
    with sdpa_kernel(SDPBackend.MATH), fused_activations(model):
        value = _value(model, parameters, objective, batch)
        chunk = chunk or directions_per_chunk(likelihood, batch, directions.device)

        def derivative(block: Tensor) -> Tensor:
            pieces = parameters.split(block)
            tangents = {n: t.to(weights[n].dtype) for n, t in zip(parameters.live, pieces, strict=True)}
            return jvp(value, (weights,), (tangents,))[1]

        def derivatives(block: Tensor) -> Tensor:
            scaled, factors = unit(block)
            found = vmap(derivative)(scaled)
            return found * factors.to(found.dtype).view(-1, 1, 1)

        try:
            parts = [derivatives(directions[at : at + chunk]) for at in range(0, len(directions), chunk)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # its plain forward pass has run, so it is the derivative or the batching
            raise UnsupportedError(
                f"{type(model).__name__} has an operation without batched forward-mode derivative "
                f"({str(error).splitlines()[0]}); use readout='difference', or attn_implementation='eager'"
            ) from error
    result = torch.cat(parts).permute(1, 2, 0)
    if not bool(torch.isfinite(result).all()):
        raise NumericalError("a derivative of the query's log-likelihood is not finite: is the model's own loss NaN?")
    return result


def _value(
    model: nn.Module, parameters: Parameters, objective: Objective, batch: Batch
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Weights -> (queries, positions), whose derivative is that of the log-likelihoods.

    Where the output layer is a plain Linear that does not respond, this stops at the last hidden state and multiplies
    with the covectors there.
    """
    likelihood = Likelihood(model, objective)
    head = output_layer(model, parameters, objective)
    if head is not None:
        hidden, logits, labels = hidden_states(likelihood, head, batch)
        hidden_gradients = hidden_state_gradients(head, hidden, logits, labels)
        if hidden_gradients is not None:
            body, positions = Hidden(model, objective, head), labels.shape[1]
            return lambda weights: (
                body.at(weights, batch)[:, :positions].to(hidden_gradients.dtype) * hidden_gradients
            ).sum(-1)

    def whole(weights: dict[str, Tensor]) -> Tensor:
        return log_probabilities(*likelihood.at(weights, batch))

    return whole
