"""Equal small networks trained as one: their layers as batched matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector


class StackedMLP:
    """The MLPs of all arms, the parameters of each as one row of a matrix.

    The networks' own parameters become views of their rows: to evaluate or save one of them is to
    evaluate or save what is trained here. Backward is written out, which costs two thirds of
    autograd's time on networks of this size.

    Args:
        networks: `nn.Sequential`s of equal shape: maybe a `Flatten`, then `Linear` and `ReLU` in
            turns, the last one `Linear`.

    Attributes:
        weights: (arms, numbers), of each arm all parameters end to end.
        gradients: Those of `weights`; filled by `backward`.

    Raises:
        ValueError: a network has other layers.
    """

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        parameters = [list(network.parameters()) for network in networks]
        self.weights = torch.stack([parameters_to_vector(p) for p in parameters]).detach()
        self.gradients = torch.zeros_like(self.weights)
        for row, own in zip(self.weights, parameters, strict=True):
            for parameter, view in zip(own, _views(row, own), strict=True):
                parameter.data = view
        linear = _linear_layers(networks[0])
        self._layers = _stacked(self.weights, linear)
        self._gradients = _stacked(self.gradients, linear)
        self._inputs: list[Tensor] = []
        # Where results go, again and again: what is as large as these and new in every update costs
        # as much to have from the system as to fill.
        self._hidden: dict[int, list[Tensor]] = {}
        self._slopes: dict[int, list[Tensor]] = {}
        self._products = [weight.new_empty(weight.shape) for weight, _ in self._layers]
        self._alone = [
            [(layer.weight.detach(), layer.bias.detach()) for layer in _linear_layers(network)]
            for network in networks
        ]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return every arm's outputs, (arms, b, outputs), on its inputs, (arms, b, features)."""
        self._inputs = [inputs]
        *hidden, (last, last_bias) = self._layers
        outputs = self._places(self._hidden, inputs.shape[1])
        for (weight, bias), output in zip(hidden, outputs, strict=True):
            torch.baddbmm(bias, self._inputs[-1], weight.mT, out=output)
            self._inputs.append(output.relu_())
        return torch.baddbmm(last_bias, self._inputs[-1], last.mT)

    def _places(self, known: dict[int, list[Tensor]], size: int) -> list[Tensor]:
        """Return one tensor for each hidden layer, (arms, size, width); always the same ones."""
        if size not in known:
            widths = [bias.shape[2] for _, bias in self._layers[:-1]]
            known[size] = [self.weights.new_empty(len(self.weights), size, w) for w in widths]
        return known[size]

    def alone(self, arm: int, inputs: Tensor) -> Tensor:
        """Return one arm's outputs, (outputs,), on its inputs, (features,)."""
        for place, layer in enumerate(self._alone[arm]):
            inputs = functional.linear(inputs.relu_() if place else inputs, *layer)
        return inputs

    def backward(self, gradient: Tensor) -> None:
        """Fill `gradients`, given that at the outputs of the last call, (arms, b, outputs)."""
        masked = torch.ops.aten.threshold_backward.grad_input
        slopes = self._places(self._slopes, gradient.shape[1])
        for place in range(len(self._layers) - 1, -1, -1):
            inputs, (weight, bias) = self._inputs[place], self._gradients[place]
            weight.copy_(torch.bmm(gradient.mT, inputs, out=self._products[place]))
            torch.sum(gradient, 1, keepdim=True, out=bias)
            if place:
                slope = slopes[place - 1]
                torch.bmm(gradient, self._layers[place][0], out=slope)
                gradient = masked(slope, inputs, 0, grad_input=slope)


def _views(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of `row`, (parameters,), in the shapes of the tensors `like`."""
    parts = row.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    kinds = [type(layer) for layer in network.children()]
    layers = [layer for layer in network.children() if isinstance(layer, nn.Linear)]
    alternating = ([nn.Linear, nn.ReLU] * len(layers))[:-1]
    if kinds not in (alternating, [nn.Flatten, *alternating]):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"no MLP of linear layers and ReLUs: {names}")
    return layers


def _stacked(rows: Tensor, layers: Sequence[nn.Linear]) -> list[tuple[Tensor, Tensor]]:
    """Return views: of each layer the weights, (arms, out, in), and biases, (arms, 1, out)."""
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    starts = [0, *accumulate(p.numel() for p in parameters)]
    parts = [
        rows[:, start : start + p.numel()].view(len(rows), *(p.shape if p.ndim == 2 else (1, -1)))
        for start, p in zip(starts, parameters, strict=False)
    ]
    return list(zip(parts[::2], parts[1::2], strict=True))
