"""Convolutions over a few time steps with many channels, as matrix products on the CPU.

There torch convolves such inputs two to three times as slowly as the one matrix product that it is; GPUs have kernels
for it. Parameters and results are those of `nn.Conv1d` and `nn.ConvTranspose1d`.

Shapes: b batch, c channels, h time steps, k kernel size.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)


class TimeConv1d(nn.Conv1d):
    """Convolve over time; without dilation or groups."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        (kernel_size,), (stride,), (padding,) = self.kernel_size, self.stride, self.padding
        windows = F.pad(x, (padding, padding)).unfold(2, kernel_size, stride)  # (b, c, h', k)
        windows = windows.transpose(1, 2).flatten(2)  # (b, h', c·k)
        return F.linear(windows, self.weight.flatten(1), self.bias).transpose(1, 2)  # (b, c', h')


class TimeUpsample1d(nn.ConvTranspose1d):
    """Double the time steps by a transposed convolution with k = 4, stride 2 and padding 1."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=4, stride=2, padding=1)

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        if x.device.type != "cpu" or output_size is not None:
            return super().forward(x, output_size)
        parts = F.linear(x.transpose(1, 2), self.weight.flatten(1).T).unflatten(2, (-1, 4))  # (b, h, c', k)
        first, second, third, fourth = parts.transpose(1, 2).unbind(-1)  # (b, c', h) each
        # Step i of the input reaches the steps 2i − 1 … 2i + 2 of the output.
        even = second + F.pad(fourth, (1, -1))  # shifted by one step
        odd = third + F.pad(first, (-1, 1))
        return torch.stack([even, odd], dim=-1).flatten(2) + self.bias[:, None]  # (b, c', 2h)
