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
from ..freezing import PartlyFrozen
from ..layers.category_specific import (
    Categories,
    CategorySpecificActionEncoder,
    CategorySpecificMLP,
    PreparedActionEncoder,
    PreparedMLP,
)
from ..layers.dit import DiT, PreparedDiT
from ..losses import mean_over
from ..precision import compute_dtype
from ..samplers import FlowSampler, draw_noise
from ..seam import Draws, Features, PolicyInputs, checked_draw


class LearnedVectors(nn.Embedding):
    """Hold one learned vector per position; all of them, or the first ones, are read at once."""

    def reset_parameters(self) -> None:
        """Draw them with standard deviation 0.02, as published."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, count: int) -> torch.Tensor:
        """Return the first `count` vectors, (count, d)."""
        return self.weight[:count]


class Prepared(NamedTuple):
    """What of sampling a chunk does not depend on the noisy actions, for all steps or for one."""

    prefix: torch.Tensor  # (b, 1 or more, d) tokens before the actions
    encoder: PreparedActionEncoder | PreparedMLP
    dit: PreparedDiT
    decoder: PreparedMLP

    def at(self, i: int) -> Prepared:
        """Return what the i-th step needs."""
        return Prepared(self.prefix, self.encoder.at(i), self.dit.at(i), self.decoder)


class FlowmatchingActionHead(PartlyFrozen):
    """Learn and follow the velocity from noise to actions, given features of pictures and words, and a state.

    Args:
        config (`FlowmatchingActionHeadConfig`): its widths are the padded ones.

    Raises:
        InvalidConfigError: the config is inconsistent, or another head's.
    """

    config_class: ClassVar[type[FlowmatchingActionHeadConfig]] = FlowmatchingActionHeadConfig

    # Small, or a robot's own: what its states and actions go through. Beside adapters they are trained in full, since
    # those of a new robot start from nothing.
    modules_to_save = ("state_encoder", "action_encoder", "action_decoder", "position_embedding")
    parameter_parts = {"tune_projector": modules_to_save, "tune_diffusion_model": ("model",)}
    lora_targets = {"tune_diffusion_model": ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")}
    stages = {"prepare": "prepare", "denoise": "step"}
    reads_state = True
    no_split_modules = ("TransformerBlock",)

    def __init__(self, config: FlowmatchingActionHeadConfig):
        super().__init__()
        if type(config) is not self.config_class:
            raise InvalidConfigError(
                f"{type(self).__name__} is built from {self.config_class.__name__}, not {type(config).__name__}."
            )
        config.validate()
        self.config = config
        self.features_dim = config.features_dim
        # Time runs from 0, noise, to 1, actions.
        s = config.noise_s
        self.sampler = FlowSampler(0, config.noise_beta_alpha, config.noise_beta_beta, start=s, slope=-1.0, scale=s)
        n, d, hidden = config.max_num_embodiments, config.input_embedding_dim, config.hidden_size
        self.model = DiT(config.dit_config())
        self.state_encoder = CategorySpecificMLP(n, config.max_state_dim, hidden, d)
        self.action_encoder = CategorySpecificActionEncoder(n, config.action_dim, d)
        self.action_decoder = CategorySpecificMLP(n, hidden, hidden, config.action_dim)
        if config.add_pos_embed:
            self.position_embedding = LearnedVectors(config.max_seq_len, d)
        self.freeze()

    # --- what is trained --------------------------------------------------------------------------------

    def frozen_modules(self) -> list[nn.Module]:
        """Return what the config says is not trained."""
        frozen: list[nn.Module] = []
        if not self.config.tune_projector:
            frozen += [self.state_encoder, self.action_encoder, self.action_decoder]
            frozen += [self.position_embedding] if self.config.add_pos_embed else []
        if not self.config.tune_diffusion_model:
            frozen.append(self.model)
        return frozen

    # --- tokens -----------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which tokens are computed; noise, time and integration are float32."""
        return compute_dtype(self.action_decoder)

    def refine(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the features (b, n, c) that the tokens attend to; N1.5 works on them first."""
        return features

    def prefix(self, state: torch.Tensor, embodiment: Categories) -> torch.Tensor:
        """Return the tokens (b, 1, d) that stand before the actions: the state's."""
        return self.state_encoder(state.to(self.dtype), embodiment)

    def _tokens(self, prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens (b, m, d): those that stand before the actions, and the actions' (b, h, d)."""
        x = x + self.position_embedding(x.shape[1]) if self.config.add_pos_embed else x
        return torch.cat([prefix, x], dim=1)

    # --- training ---------------------------------------------------------------------------------------

    def errors(
        self, features: Features, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws
    ) -> dict[str, torch.Tensor]:
        """Return `flow`, the squared error (b, h, a) of the velocity; see `velocity`."""
        velocity, wanted = self.velocity(features, inputs, actions, draws)
        return {"flow": (velocity - wanted).square().unflatten(0, (-1, len(actions))).mean(0)}

    def velocity(
        self, features: Features, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the velocity between noise and actions as predicted and as it should be, (b, h, a) each, float32.

        Where the config says `expand_batch=k`, b is k times the batch given, in the order 0, 1, …, 0, 1, …

        Args:
            features: tokens (b, n, c) of the backbone; the mask is read where the config says `mask_padding`.
            inputs: `state` (b, s) or (b, 1, s) normalised, padded with zeros; `embodiment_id` (b,).
            actions: (b, h, a) normalised labels, padded with zeros.
            draws: `noise` (b, h, a) and `time` (b,), of the expanded batch.

        Raises:
            FeatureShapeError: a tensor of another shape than the config says.
            FeatureValueError: an embodiment that has no slot.
        """
        tokens, mask, state = self._read(features, inputs)
        embodiment, config = self._embodiment(inputs.embodiment_id, len(tokens)), self.config
        _check_shape("actions", actions, (len(tokens), config.action_horizon, config.action_dim))
        tokens = self.refine(tokens, mask)
        times = config.expanded
        tokens, mask, state, actions, embodiment = (
            _repeated(x, times) for x in (tokens, mask, state, actions.float(), embodiment)
        )
        # 1. Mix actions and noise.
        b, noise, time, sampler = len(actions), draws.noise, draws.time, self.sampler
        noise = torch.randn_like(actions) if noise is None else checked_draw("noise", noise, actions.shape).float()
        time = sampler.draw_time(b, actions.device) if time is None else sampler.given_time(time, b)
        noisy, wanted = self.sampler.mix(actions, noise, time)  # (b, h, a)
        # 2. Predict the velocity.
        timesteps = (time * config.num_timestep_buckets).long()  # (b,)
        code = self.action_encoder.time_code(timesteps)  # (b, d)
        x = self.action_encoder(noisy.to(self.dtype), code, embodiment)  # (b, h, d)
        x = self.model(self._tokens(self.prefix(state, embodiment), x), tokens, timesteps, mask)
        return self.action_decoder(x[:, -config.action_horizon :], embodiment).float(), wanted

    # --- inference --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, features: Features, inputs: PolicyInputs, draws: Draws) -> torch.Tensor:
        """Return actions (b, h, a), float32: the velocity followed from noise by Euler's method.

        Args:
            features, inputs: as in `velocity`.
            draws: `noise` (b, h, a) to start from, or its `generator`; `num_steps`, by default the config's
                `num_inference_timesteps`.

        Raises:
            InvalidConfigError: fewer than one step.
            FeatureShapeError, FeatureValueError: as in `velocity`.
        """
        config = self.config
        steps = config.num_inference_timesteps if draws.num_steps is None else draws.num_steps
        tokens, mask, state = self._read(features, inputs)
        shape = (len(tokens), config.action_horizon, config.action_dim)
        noise = draw_noise(shape, draws.noise, draws.generator, tokens.device)
        buckets = [int(time * config.num_timestep_buckets) for time in self.sampler.times(steps)]
        prepared = self.prepare(tokens, mask, state, inputs.embodiment_id, torch.tensor(buckets, device=tokens.device))
        return self.sampler.integrate(noise, lambda x, i: self.step(x, prepared.at(i)), steps)

    def prepare(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        state: torch.Tensor,
        embodiment_id: torch.Tensor | None,
        timesteps: torch.Tensor,
    ) -> Prepared:
        """Return what all steps of sampling share: keys and values of the features, modulations, the state's token.

        Weights of the embodiments are read here, once.
        """
        embodiment = self._embodiment(embodiment_id, len(features))
        return Prepared(
            self.prefix(state, embodiment),
            self.action_encoder.prepare(self.action_encoder.time_code(timesteps), embodiment),
            self.model.prepare(self.refine(features, mask), timesteps, mask),
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
            action_input: `state`, `action`, `embodiment_id`, `action_mask`.
            noise, time: see `velocity`.

        Raises:
            MissingFeatureError: one of them is absent.
        """
        features, inputs = _entries(backbone_output, action_input)
        actions = action_input.get("actions", action_input.get("action"))
        if actions is None:
            raise MissingFeatureError(["action"], action_input, ["state", "action", "embodiment_id"], "action_input")
        action_mask = action_input.get("action_mask")
        if action_mask is not None:
            _check_shape("action_mask", action_mask, tuple(actions.shape))
        velocity, wanted = self.velocity(features, inputs, actions, Draws(noise=noise, time=time))
        loss = mean_over((velocity - wanted).square(), action_mask=_repeated(action_mask, self.config.expanded))
        return BatchFeature(data={"loss": loss, "predictions": velocity})

    def get_action(
        self, backbone_output: Mapping[str, Any], action_input: Mapping[str, Any], **draws: Any
    ) -> BatchFeature:
        """Return `action_pred` (b, h, a); `draws` are `noise`, `generator` and `num_steps`, see `sample`."""
        features, inputs = _entries(backbone_output, action_input)
        return BatchFeature(data={"action_pred": self.sample(features, inputs, Draws(**draws))})

    inference = get_action

    # --- inputs -----------------------------------------------------------------------------------------

    def _read(
        self, features: Features, inputs: PolicyInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the features (b, n, c), their mask for attention (b, 1, 1, n) or None where nothing is masked, and
        the state (b, 1, s)."""
        tokens, mask = features.tokens, features.mask
        if tokens.ndim != 3 or tokens.shape[-1] != self.features_dim:
            raise FeatureShapeError("features", tuple(tokens.shape), f"(batch, tokens, {self.features_dim})")
        state = inputs.state[:, None] if inputs.state.ndim == 2 else inputs.state
        _check_shape("state", state, (len(tokens), 1, self.config.max_state_dim))
        if mask is not None and self.config.mask_padding:
            _check_shape("mask", mask, tuple(tokens.shape[:2]))
            return tokens.to(self.dtype), mask.bool()[:, None, None], state
        return tokens.to(self.dtype), None, state

    def _embodiment(self, ids: torch.Tensor | None, batch_size: int) -> Categories:
        """Return the slots (b,) of embodiments, or the one that all samples share: 0 where only one robot is known."""
        if ids is None:
            return 0
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


def _entries(backbone_output: Mapping[str, Any], action_input: Mapping[str, Any]) -> tuple[Features, PolicyInputs]:
    """Return features and inputs of the two mappings of InternManip's document."""
    given, expected = backbone_output.keys() | action_input.keys(), ("backbone_features", "state", "embodiment_id")
    missing = [name for name in expected if name not in given]
    if missing:
        raise MissingFeatureError(missing, given, expected, "The input of the action head")
    features = Features(backbone_output["backbone_features"], backbone_output.get("backbone_attention_mask"))
    return features, PolicyInputs(state=action_input["state"], embodiment_id=action_input["embodiment_id"])


def _repeated(x: Any, times: int) -> Any:
    """Return a tensor (b, …) so many times, one batch after the other; what is no tensor as it is."""
    return x.repeat(times, *[1] * (x.ndim - 1)) if isinstance(x, torch.Tensor) and times > 1 else x


def _check_shape(name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise FeatureShapeError(name, tuple(x.shape), str(expected))
