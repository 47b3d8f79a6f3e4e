"""Gradient predictor: a query's gradient, predicted from one forward pass.

The gradient by the model's last hidden state is exact: it follows from the logits. Gradients by the outputs of blocks
are predicted from it by linear maps, the error projections, which ridge regression fits on training rows when the bank
is built. Within a block the VJPs of attention and MLP are analytic. Together with the recorded inputs of layers, that
makes gradients of weights; their products with responses are coarse scores of all rows, for one forward pass.
(Synthetic gradients: Jaderberg et al. 2017, there in order to train without waiting.)
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericalError, UnsupportedError
from ..layers.activations import ActivationRecorder
from ..layers.attention import Attention
from ..layers.block import Block
from ..layers.comparison import identical
from ..layers.decoder import find_blocks
from ..layers.linear import weight_gradient
from ..layers.norm import norm_vjp
from ..layers.recorded_pass import RecordedPass
from ..models.compat import fused_activations, refuse_inactive_adapters
from ..models.likelihood import Batch, Likelihood, Objective, row_losses
from ..models.lora import TrackedWeight, tracked_weights
from ..models.names import canonical_name
from ..models.output_head import find_output_layer, hidden_state_gradients, label_gradients
from ..models.parameters import TrackedParameters


__all__ = ["GradientPredictor", "RecordedPass"]

_RIDGE = 1e-2  # relative to the mean eigenvalue of the errors' second moments


class GradientPredictor:
    """Predicts gradients of queries by the tracked parameters; the model is in evaluation mode.

    Args:
        projections (`Mapping[str, Tensor]`, *optional*): error projections from `fit`: canonical path of a layer ->
            (d, out), from the error at the end of the model to the error at the layer's output.

    Raises:
        UnsupportedError: the model has no plain output layer, or parameters are tracked outside linear layers.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: TrackedParameters,
        objective: Objective,
        projections: Mapping[str, Tensor] | None = None,
    ):
        self.model, self.parameters, self.objective = model, parameters, objective
        head = find_output_layer(model, objective)
        if head is None:
            raise UnsupportedError(
                f"{type(model).__name__} is no causal language model with a plain output layer. Without it gradients "
                "cannot be predicted. Use gradient_predictor=False"
            )
        self._head: Any = head
        self._head_path = next(path for path, module in model.named_modules() if module is head)
        self._weights = tracked_weights(model, parameters)
        self._layer_paths = list(dict.fromkeys(weight.layer_path for weight in self._weights))
        blocks = [block for block in find_blocks(model) if set(block.inputs) & set(self._layer_paths)]
        self._blocks: dict[str, Block] = {path: block for block in blocks for path in block.inputs}
        self._blocks_are_checked = False
        self._projections: dict[str, Tensor] = {}
        if projections is not None:
            paths = {canonical_name(path): path for path, _ in model.named_modules()}
            unknown = sorted(set(projections) - set(paths))
            if unknown:
                raise UnsupportedError(f"the bank has an error projection of {unknown[0]!r}, which the model lacks")
            self._projections = {paths[name]: value for name, value in projections.items()}

    def try_batch(self, batch: Batch) -> None:
        """Record one batch as `fit` does and predict with empty projections, so that an error shows early.

        Raises:
            UnsupportedError: as `fit`.
        """
        self._check_blocks(self._record(batch).recorder)
        paths = self._projected_paths()
        recorded = self._record(batch, paths)
        width, outputs = recorded.error.shape[-1], recorded.recorder.outputs
        none = torch.zeros(1, 1, device=recorded.error.device)
        self._projections = {path: none.expand(width, outputs[path].shape[-1]) for path in paths if path in outputs}
        self(batch)

    @property
    def fitting_bytes(self) -> int:
        """Approximate number of bytes that `fit` holds."""
        width = int(self._head.in_features)
        return 8 * width * width * (len(self._projected_paths()) + 2)

    def fit(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Fit the error projections on training rows, with one backward pass per batch.

        Returns:
            Float32 matrices (d, out) by canonical path.

        Raises:
            UnsupportedError: no row has a supervised token with an error.
        """
        moments = torch.zeros(0)
        products: dict[str, Tensor] = {}
        for batch in batches:
            if not self._blocks_are_checked:
                recorded = self._record(batch)
                with _full_precision(recorded.error):
                    self._check_blocks(recorded.recorder)
            paths = self._projected_paths()
            recorded = self._record(batch, paths)
            with torch.enable_grad(), _full_precision(recorded.error):
                total = -row_losses(recorded.logits, recorded.labels).sum()
                outputs = [recorded.recorder.outputs[path] for path in paths]
                gradients = torch.autograd.grad(total, outputs, allow_unused=True) if outputs else ()
            error = recorded.error.flatten(0, 1)
            if not len(moments):
                moments = torch.zeros(error.shape[1], error.shape[1], dtype=torch.float64, device=error.device)
            with _full_precision(error):
                moments += (error.T @ error).double()
                for path, gradient in zip(paths, gradients, strict=True):
                    if gradient is not None:
                        target = gradient[:, : recorded.error.shape[1]].flatten(0, 1).to(error.dtype)
                        products[path] = products.get(path, 0.0) + (error.T @ target).double()
        if not len(moments) or not float(moments.trace()) > 0:
            raise UnsupportedError("the rows have no supervised token with an error, so there is nothing to fit")
        ridge = _RIDGE * float(moments.trace()) / len(moments)
        factor = torch.linalg.cholesky(moments + ridge * torch.eye(len(moments)).to(moments))
        self._projections = {path: torch.cholesky_solve(product, factor).float() for path, product in products.items()}
        return {canonical_name(path): value.cpu() for path, value in self._projections.items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Predict gradients (queries, P) of the log-likelihood, summed over each query's output tokens, float32.

        Raises:
            NumericalError: a predicted gradient is not finite.
            UnsupportedError: an error projection is missing, or all adapters with tracked weights are inactive.
        """
        refuse_inactive_adapters(self.model, self.parameters.live)
        return self.predict(self._record(batch))

    @property
    def recorded_paths(self) -> set[str]:
        """Paths of the layers that a recorded pass must have for `predict`."""
        return {weight.module_path for weight in self._weights} | set(self._projected_paths()) | set(self._blocks)

    @torch.no_grad()
    def predict(self, recorded: RecordedPass) -> Tensor:
        """Predict from a pass that was recorded for something else, too; see `__call__`."""
        with _full_precision(recorded.error):
            return self._predict(recorded)

    def _predict(self, recorded: RecordedPass) -> Tensor:
        _refuse_flat(recorded.recorder, recorded.labels)
        if not self._blocks_are_checked:
            self._check_blocks(recorded.recorder)
        missing = [canonical_name(path) for path in self._projected_paths() if path not in self._projections]
        if missing:
            raise UnsupportedError(
                f"there is no error projection of {missing[0]}: fitted on another model, or not yet. Call `fit`"
            )
        errors: dict[str, Tensor] = {}
        with fused_activations(self.model):  # for the derivatives of activations
            for path in self._layer_paths:
                if path not in errors:
                    errors |= self._errors(path, recorded)
        gradients = {weight.name: self._gradient(weight, errors, recorded) for weight in self._weights}
        result = self.parameters.join(gradients).float()
        if not bool(torch.isfinite(result).all()):
            raise NumericalError("a predicted gradient is not finite: is the model's own loss NaN?")
        return result

    def _projected_path(self, path: str) -> str:
        """Return the layer at whose output the error of the layer `path` is projected: the end of its block."""
        return self._blocks[path].output if path in self._blocks else path

    def _projected_paths(self) -> list[str]:
        """Return the layers that have error projections."""
        return sorted({self._projected_path(path) for path in self._layer_paths if path != self._head_path})

    def _record(self, batch: Batch, targets: Collection[str] = ()) -> RecordedPass:
        """Run the model; with `targets`, make a graph and record their outputs differentiably."""
        attentions = {block.path for block in self._blocks.values() if isinstance(block, Attention)}
        recorder = ActivationRecorder(self.model, self.recorded_paths, attentions, self._head, targets)
        with recorder, fused_activations(self.model), torch.set_grad_enabled(bool(targets)):
            logits, labels = Likelihood(self.model, self.objective)(batch)
        silent = sorted(set(targets) - set(recorder.outputs))
        if silent:
            raise UnsupportedError(f"{silent[0]} is not called in the forward pass, so it has no gradients to predict")
        _refuse_flat(recorder, labels)
        with _full_precision(logits):
            error = _final_error(self._head, recorder, logits.detach(), labels)
        return RecordedPass(recorder, logits, labels, error)

    def _check_blocks(self, recorder: ActivationRecorder) -> None:
        """Drop blocks that compute something else than the model: each of their inputs gets its own projection.

        Those that the model did not call (a vision tower, where rows have no images) are dropped, too.
        """
        matches = {
            block.path: block.output in recorder.inputs and block.matches_model(self.model, recorder)
            for block in self._blocks.values()
        }
        self._blocks = {path: block for path, block in self._blocks.items() if matches[block.path]}
        self._blocks_are_checked = True

    def _errors(self, path: str, recorded: RecordedPass) -> dict[str, Tensor]:
        """Predict errors at the output of a layer and of the other input projections of its block."""
        if path == self._head_path:
            return {path: label_gradients(recorded.logits, recorded.labels)}
        error = recorded.error @ self._projections[self._projected_path(path)].to(recorded.error)
        if path not in self._blocks:
            return {path: error}
        return self._blocks[path].vjp(self.model, recorded.recorder, error)

    def _gradient(self, weight: TrackedWeight, errors: Mapping[str, Tensor], recorded: RecordedPass) -> Tensor:
        inputs, error = recorded.recorder.inputs, recorded.error
        if weight.module_path not in inputs:  # its adapter is inactive
            return error.new_zeros(len(error), *self.model.get_parameter(weight.name).shape)
        x = inputs[weight.module_path][:, : error.shape[1]]
        return weight_gradient(self.model, weight, x, errors[weight.layer_path])


def _refuse_flat(recorder: ActivationRecorder, labels: Tensor) -> None:
    """Refuse a model some layer of which has rows and positions in one dimension.

    Raises:
        UnsupportedError: the message names the layer.
    """
    recorded = (recorder.inputs | recorder.outputs).items()
    flat = [path for path, x in recorded if x.ndim != 3 or len(x) != len(labels)]
    if flat:
        raise UnsupportedError(f"{flat[0]} has rows and positions in one dimension, so positions are not told apart")


def _final_error(head: nn.Module, recorder: ActivationRecorder, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient by the last residual state, or by the last hidden state where no known norm precedes it.

    Raises:
        UnsupportedError: the logits are not the output layer's product with the last hidden state.
    """
    hidden, output, norm = recorder.hidden, recorder.head_output, recorder.last_norm
    if hidden is None or output is None:
        raise UnsupportedError("the output layer was not called, or its hooks were not")
    gradients = hidden_state_gradients(head, hidden, output, logits, labels)
    if gradients is None:
        raise UnsupportedError("between the last hidden state and the logits is more than one Linear layer")
    if norm is None or norm.output.shape != hidden.shape or not identical(norm.output, hidden):
        return gradients
    by_input = norm_vjp(norm.module, norm.input, norm.output, gradients)
    return gradients if by_input is None else by_input


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off on a tensor's device: only the model's own pass runs under it."""
    return torch.autocast(tensor.device.type, enabled=False)
