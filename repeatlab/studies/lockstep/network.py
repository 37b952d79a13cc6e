"""Equal small networks trained as one: their layers as batched matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StackedMLP:
    """The MLPs of all arms, each parameter of theirs as one stack.

    Backward is written out, which costs two thirds of autograd's time on networks of this size.

    Args:
        networks: `nn.Sequential`s of equal shape: maybe a `Flatten`, then `Linear` and `ReLU` in
            turns, the last one `Linear`.

    Attributes:
        weights: Of each parameter, in order, those of all arms, (arms, *shape).
        gradients: Those of `weights`; filled by `backward`.

    Raises:
        ValueError: a network has other layers.
    """

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        for network in networks:
            _check_layers(network)
        self.weights = stack_parameters(networks)
        self.gradients = [torch.zeros_like(stack) for stack in self.weights]
        self._layers = _layers(self.weights)
        self._gradients = _layers(self.gradients)
        self._inputs: list[Tensor] = []
        # Where results go, again and again: what is as large as these and new in every update has
        # to be had from the system, page by page.
        self._hidden: dict[int, list[Tensor]] = {}
        self._slopes: dict[int, list[Tensor]] = {}

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
            known[size] = [
                bias.new_empty(len(bias), size, bias.shape[2]) for _, bias in self._layers[:-1]
            ]
        return known[size]

    def backward(self, gradient: Tensor) -> None:
        """Fill `gradients`, given that at the outputs of the last call, (arms, b, outputs)."""
        slopes = self._places(self._slopes, gradient.shape[1])
        for place in range(len(self._layers) - 1, -1, -1):
            inputs, (weight, bias) = self._inputs[place], self._gradients[place]
            torch.bmm(gradient.mT, inputs, out=weight)
            torch.sum(gradient, 1, keepdim=True, out=bias)
            if place:
                slope = slopes[place - 1]
                torch.bmm(gradient, self._layers[place][0], out=slope)
                gradient = relu_backward_(slope, inputs)


def stack_parameters(networks: Sequence[nn.Module]) -> list[Tensor]:
    """Return of each parameter, in order, those of all networks, (arms, *shape).

    The networks' own parameters become views of the stacks: to evaluate or save one of them is to
    evaluate or save what is trained here.
    """
    alike = list(zip(*(network.parameters() for network in networks), strict=True))
    stacks = [torch.stack(parameters).detach() for parameters in alike]
    for stack, parameters in zip(stacks, alike, strict=True):
        for view, parameter in zip(stack, parameters, strict=True):
            parameter.data = view
    return stacks


def relu_backward_(gradient: Tensor, outputs: Tensor) -> Tensor:
    """Set a gradient at a ReLU's outputs to 0 where these are, in place: that at its inputs.

    By the kernel of autograd's own backward: what can be said without torch's internal names, such
    as `masked_fill_(outputs <= 0, 0)`, takes ten to thirty times as long.
    """
    return torch.ops.aten.threshold_backward.grad_input(gradient, outputs, 0, grad_input=gradient)


def _check_layers(network: nn.Module) -> None:
    kinds = [type(layer) for layer in network.children()]
    alternating = ([nn.Linear, nn.ReLU] * kinds.count(nn.Linear))[:-1]
    if kinds not in (alternating, [nn.Flatten, *alternating]):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"no MLP of linear layers and ReLUs: {names}")


def _layers(stacks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return of each layer the weights, (arms, out, in), and the biases, (arms, 1, out)."""
    biases = (stack.unsqueeze(1) for stack in stacks[1::2])
    return list(zip(stacks[::2], biases, strict=True))
