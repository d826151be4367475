"""Configurations of the flow-matching action heads of GR00T N1 and N1.5 (NVIDIA 2025, arXiv 2503.14734).

Field names are those of the published config.json files.
"""

from typing import Any, Literal

from ..errors import InvalidConfigError
from .strict import StrictConfig


class SelfAttentionTransformerConfig(StrictConfig):
    """Configure a stack of transformer blocks whose tokens attend to each other.

    Defaults are those of the published code; for the published models' see `FlowmatchingActionHeadConfig`.

    Args:
        num_attention_heads, attention_head_dim (`int`): their product is the width of the tokens.
        num_layers (`int`, *optional*, defaults to 12): blocks.
        dropout (`float`, *optional*, defaults to 0.1): of what a block adds, in training.
        final_dropout (`bool`, *optional*, defaults to True): whether attention and feed-forward end with a dropout.
        attention_bias (`bool`, *optional*, defaults to True): whether queries, keys and values have a bias.
        activation_fn (`str`, *optional*, defaults to `"gelu-approximate"`): of the feed-forward; or `"gelu"`.
        positional_embeddings (`str`, *optional*, defaults to `"sinusoidal"`): added to what attends; None: nothing.
        max_num_positional_embeddings (`int`, *optional*, defaults to 512): tokens that they are there for.
        output_dim, interleave_self_attention, num_embeds_ada_norm, upcast_attention, compute_dtype: published, and
            without meaning here.
    """

    model_type = "self_attention_transformer"

    num_attention_heads: int = 8
    attention_head_dim: int = 64
    num_layers: int = 12
    dropout: float = 0.1
    final_dropout: bool = True
    attention_bias: bool = True
    activation_fn: Literal["gelu-approximate", "gelu"] = "gelu-approximate"
    positional_embeddings: Literal["sinusoidal"] | None = "sinusoidal"
    max_num_positional_embeddings: int = 512

    output_dim: int = 26
    interleave_self_attention: bool = False
    num_embeds_ada_norm: int | None = 1000
    upcast_attention: bool = False
    compute_dtype: Any = None

    @property
    def width(self) -> int:
        """Width of the tokens: all heads beside each other."""
        return self.num_attention_heads * self.attention_head_dim

    def validate_sizes(self) -> None:
        """Check that there is something of everything."""
        names = ("num_attention_heads", "attention_head_dim", "num_layers", "output_dim")
        _check_at_least_one(self, *names, "max_num_positional_embeddings")
        if not 0 <= self.dropout < 1:
            raise InvalidConfigError(f"dropout={self.dropout} must lie in [0, 1).")


class DiTConfig(SelfAttentionTransformerConfig):
    """Configure a diffusion transformer: blocks that a timestep modulates, and that attend to features.

    Args:
        output_dim (`int`, *optional*, defaults to 26): width of what it returns.
        cross_attention_dim (`int`, *optional*): width of the features; by default that of the tokens.
        interleave_self_attention (`bool`, *optional*, defaults to False): whether in every second block the tokens
            attend to each other instead.
        norm_type (`str`, *optional*, defaults to `"ada_norm"`): or `"layer_norm"`: then the timestep modulates the
            output only.
        norm_elementwise_affine (`bool`, *optional*, defaults to False): whether the blocks' plain norms have weights.
        norm_eps (`float`, *optional*, defaults to 1e-5): of the blocks' plain norms.
    """

    model_type = "dit"

    cross_attention_dim: int | None = None
    norm_type: Literal["ada_norm", "layer_norm"] = "ada_norm"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5

    def validate_features(self) -> None:
        """Check that features have a width."""
        if self.cross_attention_dim is not None:
            _check_at_least_one(self, "cross_attention_dim")


class FlowmatchingActionHeadConfig(StrictConfig):
    """Configure the action head of GR00T N1. Defaults are the published model's.

    Args:
        diffusion_model_cfg (`dict`, *optional*): fields of `DiTConfig`. None is the published transformer: 16 blocks,
            heads of width 48 as `input_embedding_dim` asks for. Of a given one, what is left out has the defaults of
            `DiTConfig`, as in the published code; only `output_dim` is `hidden_size`.
        input_embedding_dim (`int`, *optional*, defaults to 1536): width of the tokens.
        hidden_size (`int`, *optional*, defaults to 1024): width inside the state encoder and of what is decoded.
        add_pos_embed (`bool`, *optional*, defaults to True): learn a vector for each step of the chunk.
        max_seq_len (`int`, *optional*, defaults to 1024): how many such vectors there are.
        action_dim (`int`, *optional*, defaults to 32): padded width of an action.
        max_action_dim (`int`, *optional*): the same once more, as published files have it.
        action_horizon (`int`, *optional*, defaults to 16): actions predicted at once.
        max_state_dim (`int`, *optional*, defaults to 64): padded width of the state.
        max_num_embodiments (`int`, *optional*, defaults to 32): slots that encoders and decoder have weights for.
        noise_beta_alpha, noise_beta_beta, noise_s (`float`): flow times of training are
            `(noise_s - Beta(alpha, beta)) / noise_s`: more often close to 0, which is noise.
        num_timestep_buckets (`int`, *optional*, defaults to 1000): the resolution of flow times, in steps.
        num_inference_timesteps (`int`, *optional*, defaults to 16): Euler steps from noise to actions.
        tune_projector (`bool`, *optional*, defaults to True): train encoders, decoder and the steps' vectors.
        tune_diffusion_model (`bool`, *optional*, defaults to True): train the transformer.
        mask_padding (`bool`, *optional*, defaults to False): let nothing attend to padded features. The published
            models were trained without, so that a sample's actions depend on the longest prompt of its batch.
        model_dtype, compute_dtype, detection_coeff, freeze_decode_layer, load_pretrained_det_decode_layer_path:
            published, and without meaning here.

    Raises:
        InvalidConfigError: fields, those of `diffusion_model_cfg` included, that contradict each other.
        UnknownConfigFieldError: a field that does not exist.
    """

    model_type = "flow_matching_action_head"

    diffusion_model_cfg: dict[str, Any] | None = None
    input_embedding_dim: int = 1536
    hidden_size: int = 1024
    add_pos_embed: bool = True
    max_seq_len: int = 1024

    action_dim: int = 32
    max_action_dim: int | None = None
    action_horizon: int = 16
    max_state_dim: int = 64
    max_num_embodiments: int = 32

    noise_beta_alpha: float = 1.5
    noise_beta_beta: float = 1.0
    noise_s: float = 0.999
    num_timestep_buckets: int = 1000
    num_inference_timesteps: int = 16

    tune_projector: bool = True
    tune_diffusion_model: bool = True
    mask_padding: bool = False

    model_dtype: str = "float32"
    compute_dtype: str | None = None
    detection_coeff: float = 1.0
    freeze_decode_layer: bool = False
    load_pretrained_det_decode_layer_path: str | None = None

    # --- what follows from the fields -------------------------------------------------------------------

    @property
    def features_dim(self) -> int:
        """Width of the vision-language features that the head reads."""
        return self.dit_config().cross_attention_dim or self.input_embedding_dim

    @property
    def num_future_tokens(self) -> int:
        """Learned tokens between state and actions: N1 has none."""
        return 0

    @property
    def expanded(self) -> int:
        """Flow times that every sample is trained at in each step."""
        return 1

    def dit_config(self) -> DiTConfig:
        """Return the config of the diffusion transformer, complete."""
        if self.diffusion_model_cfg is not None:
            return DiTConfig(**({"output_dim": self.hidden_size} | self.diffusion_model_cfg))
        return DiTConfig(
            num_attention_heads=max(self.input_embedding_dim // 48, 1),
            attention_head_dim=48,
            num_layers=16,
            output_dim=self.hidden_size,
            dropout=0.2,
            interleave_self_attention=True,
            positional_embeddings=None,
        )

    # --- what must agree --------------------------------------------------------------------------------

    def validate_sizes(self) -> None:
        """Check that there is something of everything, and a vector for each step."""
        sizes = ("input_embedding_dim", "hidden_size", "action_dim", "action_horizon", "max_state_dim")
        _check_at_least_one(self, *sizes, "max_num_embodiments", "num_timestep_buckets", "num_inference_timesteps")
        if self.input_embedding_dim % 2:
            raise InvalidConfigError(
                f"input_embedding_dim={self.input_embedding_dim} must be even: half of it are sines, half cosines."
            )
        if self.add_pos_embed and self.action_horizon > self.max_seq_len:
            raise InvalidConfigError(
                f"action_horizon={self.action_horizon}, but there are only max_seq_len={self.max_seq_len} positions."
            )
        if self.max_action_dim not in (None, self.action_dim):
            raise InvalidConfigError(
                f"action_dim={self.action_dim}, but max_action_dim={self.max_action_dim}: both are the padded width "
                f"of an action. Set action_dim alone, or both to the same."
            )

    def validate_flow(self) -> None:
        """Check that flow times can be drawn."""
        for name in ("noise_beta_alpha", "noise_beta_beta", "noise_s"):
            if not getattr(self, name) > 0:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must be positive.")

    def validate_transformer(self) -> None:
        """Check that the diffusion transformer takes the tokens, and returns what the decoder takes."""
        dit = self.dit_config()
        _check_width("diffusion_model_cfg", dit, "input_embedding_dim", self.input_embedding_dim)
        if dit.output_dim != self.hidden_size:
            raise InvalidConfigError(
                f"diffusion_model_cfg has output_dim={dit.output_dim}, but hidden_size={self.hidden_size}: the "
                f"decoder reads what the transformer returns, so they must agree."
            )
        tokens = 1 + self.num_future_tokens + self.action_horizon
        if dit.positional_embeddings and tokens > dit.max_num_positional_embeddings:
            raise InvalidConfigError(
                f"The head has {tokens} tokens (the state, {self.num_future_tokens} future tokens, action_horizon="
                f"{self.action_horizon}), but diffusion_model_cfg has max_num_positional_embeddings="
                f"{dit.max_num_positional_embeddings}."
            )


class FlowmatchingActionHeadConfig_1_5(FlowmatchingActionHeadConfig):
    """Configure the action head of GR00T N1.5: N1's, which first lets the features attend to each other.

    Args:
        backbone_embedding_dim (`int`, *optional*, defaults to 1536): width of the features; 2048 as published, where
            the backbone does not project them. `diffusion_model_cfg` takes its `cross_attention_dim` from it.
        use_vlln (`bool`, *optional*, defaults to True): whether the features are normalised and attend to each other.
        vl_self_attention_cfg (`dict`, *optional*): fields of `SelfAttentionTransformerConfig`. None is the published
            one: 4 blocks, heads of width 64 as `backbone_embedding_dim` asks for.
        num_target_vision_tokens (`int`, *optional*, defaults to 32): learned tokens between state and actions, which
            the published weights have; 0 is InternManip's variant.
        expand_batch (`int`, *optional*): flow times that every sample is trained at in each step.
        num_inference_timesteps (`int`, *optional*, defaults to 4): Euler steps from noise to actions.
    """

    model_type = "flow_matching_action_head_1_5"

    backbone_embedding_dim: int = 1536
    use_vlln: bool = True
    vl_self_attention_cfg: dict[str, Any] | None = None
    num_target_vision_tokens: int = 32
    expand_batch: int | None = None
    num_inference_timesteps: int = 4

    @property
    def features_dim(self) -> int:
        """Width of the vision-language features that the head reads."""
        return self.backbone_embedding_dim

    @property
    def num_future_tokens(self) -> int:
        """Learned tokens between state and actions."""
        return self.num_target_vision_tokens

    @property
    def expanded(self) -> int:
        """Flow times that every sample is trained at in each step: `expand_batch`."""
        return self.expand_batch or 1

    def dit_config(self) -> DiTConfig:
        """Return the config of the diffusion transformer, complete."""
        dit = super().dit_config()
        if dit.cross_attention_dim is None:
            dit.cross_attention_dim = self.backbone_embedding_dim
        return dit

    def vl_config(self) -> SelfAttentionTransformerConfig:
        """Return the config of the features' self-attention, complete."""
        if self.vl_self_attention_cfg is not None:
            return SelfAttentionTransformerConfig(**self.vl_self_attention_cfg)
        return SelfAttentionTransformerConfig(
            num_attention_heads=max(self.backbone_embedding_dim // 64, 1),
            attention_head_dim=64,
            num_layers=4,
            dropout=0.2,
            positional_embeddings=None,
        )

    def validate_features(self) -> None:
        """Check that the transformers take features of the width that the backbone gives."""
        _check_at_least_one(self, "backbone_embedding_dim")
        if self.num_target_vision_tokens < 0:
            raise InvalidConfigError(
                f"num_target_vision_tokens={self.num_target_vision_tokens} must be at least 0, which is none."
            )
        if self.expand_batch is not None:
            _check_at_least_one(self, "expand_batch")
        if self.dit_config().cross_attention_dim != self.backbone_embedding_dim:
            raise InvalidConfigError(
                f"diffusion_model_cfg has cross_attention_dim={self.dit_config().cross_attention_dim}, but "
                f"backbone_embedding_dim={self.backbone_embedding_dim}: it attends to the backbone's features."
            )
        if self.use_vlln:
            width = self.backbone_embedding_dim
            _check_width("vl_self_attention_cfg", self.vl_config(), "backbone_embedding_dim", width)


def _check_at_least_one(config: StrictConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise InvalidConfigError(f"{name}={getattr(config, name)} must be at least 1.")


def _check_width(title: str, config: SelfAttentionTransformerConfig, name: str, expected: int) -> None:
    if config.width != expected:
        raise InvalidConfigError(
            f"{title} has num_attention_heads={config.num_attention_heads} of attention_head_dim="
            f"{config.attention_head_dim}, {config.width} in all, but {name}={expected}: they must agree."
        )
