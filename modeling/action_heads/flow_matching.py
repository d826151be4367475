"""FlowmatchingActionHead: the action head of GR00T N1, which turns noise into actions by following a velocity.

Shapes: b batch, n vision-language tokens, c their width, h action horizon, s and a the padded widths of state and
action, d width of the head's own tokens. Time runs from 0, noise, to 1, actions. Source: Bjorck et al. 2025 (arXiv
2503.14734) and NVIDIA's Isaac-GR00T, whose parameter names are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import BatchFeature

from ...configuration.flow_matching import FlowmatchingActionHeadConfig
from ...errors import FeatureShapeError, FeatureValueError, InvalidConfigError, MissingFeatureError
from ..layers.category_specific import (
    Categories,
    CategorySpecificActionEncoder,
    CategorySpecificMLP,
    PreparedActionEncoder,
    PreparedMLP,
)
from ..layers.dit import DiT, PreparedDiT
from ..layers.masking import masked_mean


class LearnedVectors(nn.Embedding):
    """Hold one learned vector per position; all of them, or the first ones, are read at once."""

    def reset_parameters(self) -> None:
        """Draw them with standard deviation 0.02, as published."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, count: int) -> torch.Tensor:
        """Return the first `count` vectors, (count, d)."""
        return self.weight[:count]


class FlowError(NamedTuple):
    """How far the predicted velocity is off; with an expanded batch all of it is expanded."""

    error: torch.Tensor  # (b, h, a) squared, unreduced, float32
    velocity: torch.Tensor  # (b, h, a) as predicted, float32
    action_mask: torch.Tensor | None  # (b, h, a) as given


class Prepared(NamedTuple):
    """What of sampling a chunk does not depend on the noisy actions, for all steps or for one."""

    prefix: torch.Tensor  # (b, 1 or more, d) tokens before the actions
    encoder: PreparedActionEncoder | PreparedMLP
    dit: PreparedDiT
    decoder: PreparedMLP

    def at(self, i: int) -> Prepared:
        """Return what the i-th step needs."""
        return Prepared(self.prefix, self.encoder.at(i), self.dit.at(i), self.decoder)


class FlowmatchingActionHead(nn.Module):
    """Learn and follow the velocity from noise to actions, given features of pictures and words, and a state.

    Args:
        config (`FlowmatchingActionHeadConfig`): its widths are the padded ones.

    Raises:
        InvalidConfigError: the config is inconsistent, or another head's.
    """

    config_class: ClassVar[type[FlowmatchingActionHeadConfig]] = FlowmatchingActionHeadConfig

    def __init__(self, config: FlowmatchingActionHeadConfig):
        super().__init__()
        if type(config) is not self.config_class:
            raise InvalidConfigError(
                f"{type(self).__name__} is built from {self.config_class.__name__}, not {type(config).__name__}."
            )
        config.validate()
        self.config = config
        self.features_dim = config.features_dim
        n, d, hidden = config.max_num_embodiments, config.input_embedding_dim, config.hidden_size
        self.model = DiT(config.dit_config())
        self.state_encoder = CategorySpecificMLP(n, config.max_state_dim, hidden, d)
        self.action_encoder = CategorySpecificActionEncoder(n, config.action_dim, d)
        self.action_decoder = CategorySpecificMLP(n, hidden, hidden, config.action_dim)
        if config.add_pos_embed:
            self.position_embedding = LearnedVectors(config.max_seq_len, d)
        self.freeze()

    # --- what is trained --------------------------------------------------------------------------------

    def _frozen_modules(self) -> list[nn.Module]:
        """Return what the config says is not trained."""
        frozen: list[nn.Module] = []
        if not self.config.tune_projector:
            frozen += [self.state_encoder, self.action_encoder, self.action_decoder]
            frozen += [self.position_embedding] if self.config.add_pos_embed else []
        if not self.config.tune_diffusion_model:
            frozen.append(self.model)
        return frozen

    def freeze(self) -> None:
        """Mark what the config says is not trained."""
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> FlowmatchingActionHead:
        """Set training mode, except in what the config freezes and nobody has unfrozen: it has dropout."""
        super().train(mode)
        for module in self._frozen_modules():
            module.train(mode and any(parameter.requires_grad for parameter in module.parameters()))
        return self

    # --- tokens -----------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which tokens are computed; noise, time and integration are float32."""
        return self.action_decoder.layer2.W.dtype

    def read(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the features (b, n, c) that the tokens attend to; N1.5 works on them first."""
        return features

    def prefix(self, state: torch.Tensor, embodiment: Categories) -> torch.Tensor:
        """Return the tokens (b, 1, d) that stand before the actions: the state's."""
        return self.state_encoder(state.to(self.dtype), embodiment)

    def expand(self, *batch: Any) -> tuple:
        """Return tensors of a training batch as many times as each sample is trained on: N1 does so once."""
        return batch

    def _tokens(self, prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens (b, m, d): those that stand before the actions, and the actions' (b, h, d)."""
        x = x + self.position_embedding(x.shape[1]) if self.config.add_pos_embed else x
        return torch.cat([prefix, x], dim=1)

    # --- training ---------------------------------------------------------------------------------------

    def sample_time(self, batch_size: int, device: torch.device | str) -> torch.Tensor:
        """Draw flow times (b,): more often close to 0, since what noise is to become is the harder question."""
        config = self.config
        parameters = torch.tensor([config.noise_beta_alpha, config.noise_beta_beta], device=device)
        drawn = torch.distributions.Beta(*parameters).sample((batch_size,))
        return (config.noise_s - drawn) / config.noise_s

    def loss(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        state: torch.Tensor,
        actions: torch.Tensor,
        action_mask: torch.Tensor | None,
        embodiment_id: torch.Tensor,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> FlowError:
        """Return the squared error (b, h, a) of the velocity between noise and actions.

        Where the config says `expand_batch=k`, b is k times the batch given, in the order 0, 1, …, 0, 1, …

        Args:
            features: (b, n, c) of the backbone.
            mask: (b, n), 0 or False where they are padded; None: nowhere. Read where the config says `mask_padding`.
            state: (b, s) or (b, 1, s) normalised, padded with zeros.
            actions: (b, h, a) normalised labels, padded with zeros.
            action_mask: (b, h, a), 0 or False where a label does not count; returned, not applied.
            embodiment_id: (b,) slots of the encoders and the decoder.
            noise: (b, h, a) standard normal numbers, of the expanded batch; drawn when None.
            time: (b,) flow times, of the expanded batch; drawn when None.

        Raises:
            FeatureShapeError: a tensor of another shape than the config says.
            FeatureValueError: an embodiment that has no slot.
        """
        mask, state = self._checked(features, mask, state)
        b, config = len(features), self.config
        _check_shape("actions", actions, (b, config.action_horizon, config.action_dim))
        if action_mask is not None:
            _check_shape("action_mask", action_mask, tuple(actions.shape))
        embodiment = self._embodiment(embodiment_id, b)
        features = self.read(features.to(self.dtype), mask)
        features, mask, state, actions, action_mask, embodiment = self.expand(
            features, mask, state, actions.float(), action_mask, embodiment
        )
        # 1. Mix actions and noise.
        noise = torch.randn_like(actions) if noise is None else noise.float()
        time = self.sample_time(len(actions), actions.device) if time is None else time.float()
        _check_shape("noise", noise, tuple(actions.shape))
        _check_shape("time", time, (len(actions),))
        t = time[:, None, None]  # (b, 1, 1)
        noisy = (1 - t) * noise + t * actions  # (b, h, a)
        # 2. Predict the velocity.
        timesteps = (time * config.num_timestep_buckets).long()  # (b,)
        code = self.action_encoder.time_code(timesteps)  # (b, d)
        x = self.action_encoder(noisy.to(self.dtype), code, embodiment)  # (b, h, d)
        x = self.model(self._tokens(self.prefix(state, embodiment), x), features, timesteps, mask)
        velocity = self.action_decoder(x[:, -config.action_horizon :], embodiment).float()  # (b, h, a)
        return FlowError((velocity - (actions - noise)).square(), velocity, action_mask)

    # --- inference --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        state: torch.Tensor,
        embodiment_id: torch.Tensor,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        """Return actions (b, h, a), float32: the velocity followed from noise, in `num_steps` steps of Euler's method.

        Args:
            features, mask, state, embodiment_id: as in `loss`.
            noise: (b, h, a) to start from; drawn when None.
            generator: of the noise.
            num_steps: by default the config's `num_inference_timesteps`.

        Raises:
            InvalidConfigError: fewer than one step.
            FeatureShapeError, FeatureValueError: as in `loss`.
        """
        steps = self.config.num_inference_timesteps if num_steps is None else num_steps
        if steps < 1:
            raise InvalidConfigError(f"num_steps={steps} must be at least 1.")
        shape = (len(features), self.config.action_horizon, self.config.action_dim)
        if noise is None:
            device = features.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device).to(features.device)
        _check_shape("noise", noise, shape)
        prepared = self.prepare(features, mask, state, embodiment_id, steps)
        x = noise.float()
        for i in range(steps):
            x = torch.add(x, self.step(x, prepared.at(i)), alpha=1 / steps)
        return x

    def prepare(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        state: torch.Tensor,
        embodiment_id: torch.Tensor,
        steps: int,
    ) -> Prepared:
        """Return what all steps of sampling share: keys and values of the features, modulations, the state's token.

        Weights of the embodiments are read here, once.
        """
        mask, state = self._checked(features, mask, state)
        embodiment = self._embodiment(embodiment_id, len(features))
        buckets = self.config.num_timestep_buckets
        # Filled on the device: a tensor of Python numbers is copied there, which CUDA graphs cannot hold.
        timesteps = torch.cat(
            [embodiment_id.new_full((1,), int(i / steps * buckets)) for i in range(steps)]
        )  # (steps,)
        return Prepared(
            self.prefix(state, embodiment),
            self.action_encoder.prepare(self.action_encoder.time_code(timesteps), embodiment),
            self.model.prepare(self.read(features.to(self.dtype), mask), timesteps, mask),
            self.action_decoder.prepare(embodiment),
        )

    def step(self, actions: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """Return the velocity (b, h, a) of noisy actions (b, h, a), with what was prepared for one step."""
        x = self.action_encoder(actions.to(self.dtype), prepared=prepared.encoder)  # (b, h, d)
        x = self.model.step(self._tokens(prepared.prefix, x), prepared.dit, last=actions.shape[1])  # (b, h, hidden)
        return self.action_decoder(x, prepared=prepared.decoder).float()

    # --- the names of InternManip's document ------------------------------------------------------------

    def prepare_input(self, batch: Mapping[str, Any]) -> BatchFeature:
        """Return the batch, whose entries can be read as attributes as well."""
        return BatchFeature(data=dict(batch))

    def forward(
        self,
        backbone_output: Mapping[str, Any],
        action_input: Mapping[str, Any],
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> BatchFeature:
        """Return `loss`, a scalar, and `predictions`, the velocity (b, h, a).

        The loss is the mean over what `action_mask` leaves; 0, with gradients of 0, where it leaves nothing.

        Args:
            backbone_output: `backbone_features` (b, n, c), `backbone_attention_mask` (b, n).
            action_input: `state`, `action`, `embodiment_id`, `action_mask`; see `loss`, as for `noise` and `time`.

        Raises:
            MissingFeatureError: one of them is absent.
        """
        features, mask, state, embodiment_id = _entries(backbone_output, action_input)
        actions = action_input.get("actions", action_input.get("action"))
        if actions is None:
            raise MissingFeatureError(["action"], action_input, ["state", "action", "embodiment_id"])
        action_mask = action_input.get("action_mask")
        flow = self.loss(features, mask, state, actions, action_mask, embodiment_id, noise, time)
        loss = masked_mean(flow.error, action_mask=flow.action_mask)
        return BatchFeature(data={"loss": loss, "predictions": flow.velocity})

    def get_action(
        self, backbone_output: Mapping[str, Any], action_input: Mapping[str, Any], **sampling: Any
    ) -> BatchFeature:
        """Return `action_pred` (b, h, a); `sampling` (`noise`, `generator`, `num_steps`) goes to `sample`."""
        return BatchFeature(data={"action_pred": self.sample(*_entries(backbone_output, action_input), **sampling)})

    inference = get_action

    # --- inputs -----------------------------------------------------------------------------------------

    def _checked(
        self, features: torch.Tensor, mask: torch.Tensor | None, state: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the mask for attention (b, 1, 1, n), None where nothing is masked, and the state (b, 1, s)."""
        if features.ndim != 3 or features.shape[-1] != self.features_dim:
            raise FeatureShapeError("features", tuple(features.shape), f"(batch, tokens, {self.features_dim})")
        state = state[:, None] if state.ndim == 2 else state
        _check_shape("state", state, (len(features), 1, self.config.max_state_dim))
        if mask is None or not self.config.mask_padding:
            return None, state
        _check_shape("mask", mask, tuple(features.shape[:2]))
        return mask.bool()[:, None, None], state

    def _embodiment(self, ids: torch.Tensor, batch_size: int) -> Categories:
        """Return the slots (b,) of embodiments, or the one that all samples share."""
        _check_shape("embodiment_id", ids, (batch_size,))
        if torch.compiler.is_compiling():  # values are not known yet
            return ids
        lowest, highest = torch.stack(torch.aminmax(ids)).tolist()
        if lowest < 0 or highest >= self.config.max_num_embodiments:
            raise FeatureValueError(
                f"embodiment_id holds {lowest if lowest < 0 else highest}; the head has max_num_embodiments="
                f"{self.config.max_num_embodiments} slots, 0 to {self.config.max_num_embodiments - 1}."
            )
        return lowest if lowest == highest else ids


def _entries(backbone_output: Mapping[str, Any], action_input: Mapping[str, Any]) -> tuple:
    """Return features, their mask or None, state and embodiment."""
    given, expected = backbone_output.keys() | action_input.keys(), ("backbone_features", "state", "embodiment_id")
    missing = [name for name in expected if name not in given]
    if missing:
        raise MissingFeatureError(missing, given, expected)
    mask = backbone_output.get("backbone_attention_mask")
    return backbone_output["backbone_features"], mask, action_input["state"], action_input["embodiment_id"]


def _check_shape(name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise FeatureShapeError(name, tuple(x.shape), str(expected))
