"""The conditional U-Net over time that denoises action sequences (Chi et al. 2023, arXiv 2303.04137).

Shapes: b batch, h horizon, a action width, c channels, g width of the condition, n timesteps, f width of all blocks'
FiLM together. Inside, time is the last dimension. Parameter names are those that LeRobot and InternManip publish.

The network is conditioned on the diffusion timestep and on the observation by FiLM (Perez et al. 2018, arXiv
1709.07871): per block, Linear(Mish([timestep, observation])). Mish acts on each number alone, so the layer is the sum
of two halves. Of a denoising run, the observation's half is the same at every step and the timesteps' half the same
for every observation: both are computed once, by `condition_films` and `step_films`.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ...configuration.diffusion import DiffusionConfig
from ..precision import compute_dtype
from .positional import encode_timesteps
from .time_conv import TimeConv1d, TimeUpsample1d

LAST_GROUPS = 8  # of the last convolution's norm, whatever `n_groups` says: published so


class TimestepEmbedding(nn.Module):
    """Encode a timestep by sines and cosines of geometrically spaced frequencies; `width` numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
        return encode_timesteps(timesteps, steps * (-math.log(10000) / (half - 1)))  # (n, width)


class ConvBlock(nn.Module):
    """Convolution over time that keeps its length, group norm, Mish."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, groups: int):
        super().__init__()
        conv = TimeConv1d(c_in, c_out, kernel_size, padding=kernel_size // 2)
        self.block = nn.Sequential(conv, nn.GroupNorm(groups, c_out), nn.Mish())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)  # (b, c, h)


class FilmLinear(nn.Linear):
    """Map the encodings of timestep and observation, side by side, to a FiLM; each half can be mapped alone.

    Args:
        step_width, condition_width: of the two encodings.
        width: of the FiLM.
    """

    def __init__(self, step_width: int, condition_width: int, width: int):
        super().__init__(step_width + condition_width, width)
        self.step_width = step_width

    def forward(self, x: torch.Tensor, half: str | None = None) -> torch.Tensor:
        """Return (n, width): of both, or of the half "step" or "condition", of which the latter has the bias."""
        if half == "step":
            return F.linear(x, self.weight[:, : self.step_width])
        if half == "condition":
            return F.linear(x, self.weight[:, self.step_width :], self.bias)
        return super().forward(x)


class ConditionalResidualBlock(nn.Module):
    """Two convolutions with a FiLM between them, and a shortcut.

    Args:
        c_in, c_out: channels.
        step_width, condition_width: of the timestep's and of the observation's encoding.
        config: kernel, groups, and whether FiLM scales.
    """

    def __init__(self, c_in: int, c_out: int, step_width: int, condition_width: int, config: DiffusionConfig):
        super().__init__()
        self.step_width = step_width
        self.scales = config.use_film_scale_modulation
        self.film_width = 2 * c_out if self.scales else c_out
        self.conv1 = ConvBlock(c_in, c_out, config.kernel_size, config.n_groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), FilmLinear(step_width, condition_width, self.film_width))
        self.conv2 = ConvBlock(c_out, c_out, config.kernel_size, config.n_groups)
        self.residual_conv = TimeConv1d(c_in, c_out, kernel_size=1) if c_in != c_out else nn.Identity()

    def half_film(self, half: str, activated: torch.Tensor) -> torch.Tensor:
        """Return one half of the FiLM (n, 2c or c), the "condition" with its bias, for Mish(an encoding)."""
        linear = self.cond_encoder[1]
        if isinstance(linear, FilmLinear):
            return linear(activated, half)
        # Wrapped by an adapter, which maps both or none.
        if half == "condition":
            return linear(F.pad(activated, (self.step_width, 0)))
        padded = F.pad(activated, (0, linear.in_features - self.step_width))
        return linear(padded) - linear(torch.zeros_like(padded))

    def forward(self, x: torch.Tensor | None, film: torch.Tensor, half: str | None = None) -> torch.Tensor:
        """Return (b, c, h) for x (b, c_in, h) and both halves of its FiLM, added (b, 2c or c).

        Without x, `film` is Mish(an encoding), and the named half of the FiLM is returned: whatever reads weights goes
        through this call, by which FSDP and offloading know that they are needed.
        """
        if x is None:
            return self.half_film(half, film)
        h = self.conv1(x)  # (b, c, h)
        film = film[:, :, None]  # (b, 2c or c, 1)
        if self.scales:
            scale, shift = film.chunk(2, dim=1)
            h = torch.addcmul(shift, scale, h)  # shift + scale · h, no 1 + scale
        else:
            h = h + film
        return self.conv2(h) + self.residual_conv(x)


class ConditionalUnet1d(nn.Module):
    """Predict, from a noisy action sequence, the noise (or the clean actions) in it.

    Args:
        config: widths, kernel, groups; action features set.
        condition_width: g, of the observation's encoding.
    """

    def __init__(self, config: DiffusionConfig, condition_width: int):
        super().__init__()
        step_width = config.diffusion_step_embed_dim
        self.diffusion_step_encoder = nn.Sequential(
            TimestepEmbedding(step_width),
            nn.Linear(step_width, 4 * step_width),
            nn.Mish(),
            nn.Linear(4 * step_width, step_width),
        )

        def block(c_in: int, c_out: int) -> ConditionalResidualBlock:
            return ConditionalResidualBlock(c_in, c_out, step_width, condition_width, config)

        widths = config.down_dims
        last = len(widths) - 1
        self.down_modules = nn.ModuleList()
        for level, (c_in, c) in enumerate(zip((config.action_dim, *widths), widths, strict=False)):
            halve = TimeConv1d(c, c, kernel_size=3, stride=2, padding=1) if level < last else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(c_in, c), block(c, c), halve]))
        self.mid_modules = nn.ModuleList([block(widths[-1], widths[-1]), block(widths[-1], widths[-1])])
        self.up_modules = nn.ModuleList()
        for c_in, c in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.up_modules.append(nn.ModuleList([block(2 * c_in, c), block(c, c), TimeUpsample1d(c)]))
        self.final_conv = nn.Sequential(
            ConvBlock(widths[0], widths[0], config.kernel_size, LAST_GROUPS),
            TimeConv1d(widths[0], config.action_dim, kernel_size=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which it computes; batches come in float32."""
        return compute_dtype(self.diffusion_step_encoder[1])

    def blocks(self) -> list[ConditionalResidualBlock]:
        """Return the residual blocks in the order in which they are run."""
        stages = [*self.down_modules, self.mid_modules, *self.up_modules]
        return [stage[i] for stage in stages for i in (0, 1)]

    def step_films(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the timesteps' half of all blocks' FiLM side by side, (n, f), for timesteps (n,)."""
        embedding, *layers = self.diffusion_step_encoder
        x = embedding(timesteps).to(self.dtype)  # (n, step width)
        for layer in layers:
            x = layer(x)
        activated = F.mish(x)
        return torch.cat([block(None, activated, "step") for block in self.blocks()], dim=1)

    def condition_films(self, condition: torch.Tensor) -> torch.Tensor:
        """Return the observation's half of all blocks' FiLM side by side, (b, f), for its encoding (b, g)."""
        activated = F.mish(condition.to(self.dtype))
        return torch.cat([block(None, activated, "condition") for block in self.blocks()], dim=1)

    def forward(self, actions: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return the prediction (b, h, a) for noisy actions (b, h, a) at timesteps (b,), given (b, g)."""
        return self.denoise(actions.to(self.dtype), self.step_films(timesteps) + self.condition_films(condition))

    def denoise(self, actions: torch.Tensor, films: torch.Tensor) -> torch.Tensor:
        """Return the prediction (b, h, a) for noisy actions (b, h, a), with both halves of the FiLM added, (b, f)."""
        films = iter(films.split([block.film_width for block in self.blocks()], dim=1))
        x = actions.transpose(1, 2)  # (b, a, h)
        skips = []
        for first, second, halve in self.down_modules:
            x = second(first(x, next(films)), next(films))  # (b, c, h / 2^level)
            skips.append(x)
            x = halve(x)
        for block in self.mid_modules:
            x = block(x, next(films))
        # From the deepest level up; the topmost skip is not used: published so.
        for first, second, double in self.up_modules:
            x = torch.cat([x, skips.pop()], dim=1)  # (b, 2c, h / 2^level)
            x = double(second(first(x, next(films)), next(films)))
        return self.final_conv(x).transpose(1, 2)  # (b, h, a)
