"""A query's gradient, predicted from one forward pass.

The error at the end of the model is exact: it follows from the logits. What it means at the end of each block is
predicted by a linear map, fitted by ridge regression on the training rows when the bank is built; within the block,
the derivatives of attention and MLP are written out. With the layers' inputs, which hooks see, that makes a gradient.
Its products with responses are a first look at all rows, for the price of one forward pass.
(Synthetic gradients: Jaderberg et al. 2017, there in order to train without waiting.)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericalError, UnsupportedError
from ..layers.activations import PredictorActivations
from ..layers.attention import Attention
from ..layers.block import Block
from ..layers.decoder import find_blocks
from ..models.compat import fused_activations, refuse_inactive_adapters
from ..models.likelihood import Batch, Objective, row_losses
from ..models.lora import Weight, parameter_gradient, tracked_weights
from ..models.names import canonical_name
from ..models.output_head import output_layer
from ..models.parameters import Parameters


_RIDGE = 1e-2  # relative to the mean eigenvalue of the errors' second moments


class GradientPredictor:
    """Predicts gradients of queries with respect to the responding parameters; the model in evaluation mode.

    Args:
        maps (`Mapping[str, Tensor]`, *optional*): what `fit` found: canonical path of a layer -> (d, out), from the
            error at the end of the model to the error at the layer's output.

    Raises:
        UnsupportedError: the model has no plain output layer, or responding weights of other layers than Linears.
    """

    def __init__(
        self, model: nn.Module, parameters: Parameters, objective: Objective, maps: Mapping[str, Tensor] | None = None
    ):
        self.model, self.parameters, self.objective = model, parameters, objective
        head = output_layer(model, parameters, objective)
        if head is None:
            raise UnsupportedError("only a causal language model with a plain output layer shows its error at the end")
        self._head: Any = head
        self._weights = tracked_weights(model, parameters)
        self._hosts = {weight.layer_path: None for weight in self._weights}
        blocks = [block for block in find_blocks(model) if set(block.inputs) & set(self._hosts)]
        self._blocks: dict[str, Block] = {path: block for block in blocks for path in block.inputs}
        self._checked = False
        self._maps: dict[str, Tensor] = {}
        if maps is not None:
            paths = {canonical_name(path): path for path, _ in model.named_modules()}
            unknown = sorted(set(maps) - set(paths))
            if unknown:
                raise UnsupportedError(f"the bank predicts errors at {unknown[0]!r}, a layer that the model has not")
            self._maps = {paths[name]: value for name, value in maps.items()}

    @property
    def fitting_bytes(self) -> int:
        """What `fit` holds in memory, about."""
        width = int(self._head.weight.shape[1])
        return 8 * width * width * (len(self._ends()) + 2)

    def fit(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Fit the maps on training rows and return them, float32, by canonical path; runs backwards once per batch."""
        moments = torch.zeros(0)
        products: dict[str, Tensor] = {}
        for batch in batches:
            if not self._checked:
                self._check(self._trace(batch))
            ends = self._ends()
            trace = self._trace(batch, frozenset(ends))
            with torch.enable_grad():
                total = -row_losses(trace.logits, trace.labels).sum()
                errors = torch.autograd.grad(total, [trace.outputs[end] for end in ends], allow_unused=True)
            known = trace.error.flatten(0, 1)
            if not len(moments):
                moments = torch.zeros(known.shape[1], known.shape[1], dtype=torch.float64, device=known.device)
            moments += (known.T @ known).double()
            for end, error in zip(ends, errors, strict=True):
                if error is not None:
                    own = error[:, : trace.error.shape[1]].flatten(0, 1).to(known.dtype)
                    products[end] = products.get(end, 0.0) + (known.T @ own).double()
        if not len(moments) or not float(moments.trace()) > 0:
            raise UnsupportedError("the rows have no supervised token with an error, so there is nothing to fit")
        ridge = _RIDGE * float(moments.trace()) / len(moments)
        factor = torch.linalg.cholesky(moments + ridge * torch.eye(len(moments)).to(moments))
        self._maps = {end: torch.cholesky_solve(product, factor).float() for end, product in products.items()}
        return {canonical_name(end): value.cpu() for end, value in self._maps.items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Predicted gradients (queries, P) of the log-likelihood, summed over each query's output tokens, float32.

        Raises:
            NumericalError: one that is not finite.
            UnsupportedError: the maps are of another model, or all adapters that respond are merged or switched off.
        """
        refuse_inactive_adapters(self.model, self.parameters.live)
        trace = self._trace(batch)
        if not self._checked:
            self._check(trace)
        missing = [canonical_name(end) for end in self._ends() if end not in self._maps]
        if missing:
            raise UnsupportedError(f"there is no map of errors at {missing[0]}: fitted on another model, or not yet")
        errors: dict[str, Tensor] = {}
        with fused_activations(self.model):  # for the slopes of activations
            for layer_path in self._hosts:
                if layer_path not in errors:
                    errors |= self._errors(layer_path, trace)
        gradients = {weight.name: self._gradient(weight, errors, trace) for weight in self._weights}
        result = self.parameters.join(gradients).float()
        if not bool(torch.isfinite(result).all()):
            raise NumericalError("a predicted gradient is not finite: is the model's own loss NaN?")
        return result

    def _ends(self) -> list[str]:
        """Layers at whose outputs errors are predicted by a map."""
        return sorted(
            {
                self._blocks[layer_path].output if layer_path in self._blocks else layer_path
                for layer_path in self._hosts
            }
        )

    def _trace(self, batch: Batch, targets: frozenset[str] = frozenset()) -> PredictorActivations:
        layers = {weight.module_path for weight in self._weights} | set(self._ends()) | set(self._blocks)
        attentions = {block.path for block in self._blocks.values() if isinstance(block, Attention)}
        return PredictorActivations(self.model, self.objective, self._head, batch, layers, attentions, targets)

    def _check(self, trace: PredictorActivations) -> None:
        """Forget blocks that the model computes in another way than written out here: their inputs need maps."""
        sound = {block.path: block.holds(self.model, trace) for block in self._blocks.values()}
        self._blocks = {path: block for path, block in self._blocks.items() if sound[block.path]}
        self._checked = True

    def _errors(self, layer_path: str, trace: PredictorActivations) -> dict[str, Tensor]:
        """Predicted errors at the output of a layer, and of those that share its block."""
        end = self._blocks[layer_path].output if layer_path in self._blocks else layer_path
        error = trace.error @ self._maps[end].to(trace.error)
        return (
            self._blocks[layer_path].errors(self.model, trace, error)
            if layer_path in self._blocks
            else {layer_path: error}
        )

    def _gradient(self, weight: Weight, errors: Mapping[str, Tensor], trace: PredictorActivations) -> Tensor:
        if weight.module_path not in trace.inputs:  # it took no part: its adapter is switched off
            return trace.error.new_zeros(len(trace.error), *self.model.get_parameter(weight.name).shape)
        x = trace.inputs[weight.module_path][:, : trace.error.shape[1]]
        return parameter_gradient(self.model, weight, x, errors[weight.layer_path])
