"""The flow-matching heads' configs: published defaults, what must agree, what is refused."""

import pytest

from manipulators import FlowmatchingActionHeadConfig, FlowmatchingActionHeadConfig_1_5
from manipulators.errors import InvalidConfigError, UnknownConfigFieldError

SMALL = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
WIDTHS = {"input_embedding_dim": 8, "hidden_size": 6}


def n1_5(**fields):
    return FlowmatchingActionHeadConfig_1_5(**({"backbone_embedding_dim": 128} | fields))


def test_published_sizes():
    config = FlowmatchingActionHeadConfig()
    dit = config.dit_config()
    assert (dit.num_layers, dit.num_attention_heads, dit.attention_head_dim) == (16, 32, 48)
    assert (dit.output_dim, dit.dropout, dit.final_dropout) == (1024, 0.2, True)
    assert dit.interleave_self_attention and dit.positional_embeddings is None and dit.cross_attention_dim is None
    assert (config.action_dim, config.action_horizon, config.max_state_dim) == (32, 16, 64)
    assert (config.num_inference_timesteps, config.num_timestep_buckets, config.max_num_embodiments) == (16, 1000, 32)
    assert (config.noise_beta_alpha, config.noise_beta_beta, config.noise_s) == (1.5, 1.0, 0.999)
    assert (config.features_dim, config.num_future_tokens, config.mask_padding) == (1536, 0, False)


def test_published_sizes_of_n1_5():
    config = FlowmatchingActionHeadConfig_1_5()
    assert (config.features_dim, config.num_future_tokens, config.num_inference_timesteps) == (1536, 32, 4)
    assert config.use_vlln and config.expand_batch is None
    published = FlowmatchingActionHeadConfig_1_5(backbone_embedding_dim=2048)
    vl = published.vl_config()
    assert published.dit_config().cross_attention_dim == 2048
    assert (vl.num_layers, vl.num_attention_heads, vl.attention_head_dim, vl.dropout) == (4, 32, 64, 0.2)
    assert vl.positional_embeddings is None


def test_transformers_given_in_part():
    """What is left out has the published code's defaults, which are not the published model's."""
    dit = FlowmatchingActionHeadConfig(diffusion_model_cfg=SMALL, **WIDTHS).dit_config()
    assert (dit.dropout, dit.positional_embeddings, dit.interleave_self_attention) == (0.1, "sinusoidal", False)
    assert (dit.output_dim, dit.activation_fn, dit.norm_eps) == (6, "gelu-approximate", 1e-5)
    n1 = FlowmatchingActionHeadConfig(diffusion_model_cfg=SMALL | {"cross_attention_dim": 10}, **WIDTHS)
    assert n1.features_dim == 10


@pytest.mark.parametrize("kind", [FlowmatchingActionHeadConfig, FlowmatchingActionHeadConfig_1_5])
def test_json(kind, tmp_path):
    config = kind(diffusion_model_cfg=SMALL, noise_s=1, mask_padding=True, **WIDTHS)
    assert config.noise_s == 1.0 and isinstance(config.noise_s, float)
    config.save_pretrained(tmp_path)
    for again in (kind.from_pretrained(tmp_path), kind.from_dict(config.to_dict())):
        assert (again.diffusion_model_cfg, again.noise_s, again.mask_padding) == (SMALL, 1.0, True)
        assert again.dit_config().output_dim == 6
    assert kind.from_pretrained(tmp_path, action_horizon=3).action_horizon == 3


def test_fields_assigned_later():
    config = FlowmatchingActionHeadConfig()
    config.hidden_size, config.input_embedding_dim = 512, 480
    config.validate()
    assert (config.dit_config().output_dim, config.dit_config().num_attention_heads) == (512, 10)
    config.action_horizon = 2000
    with pytest.raises(InvalidConfigError, match="action_horizon=2000, but there are only max_seq_len=1024"):
        config.validate()
    with pytest.raises(UnknownConfigFieldError, match="Did you mean 'tune_projector'"):
        config.tune_projectors = False


def test_published_fields_without_meaning():
    given = {"detection_coeff": 1.0, "freeze_decode_layer": False, "load_pretrained_det_decode_layer_path": None}
    config = n1_5(**given, model_dtype="float32", compute_dtype="bfloat16", expand_batch=None, max_action_dim=32)
    assert config.detection_coeff == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_horizon": 0}, "action_horizon=0 must be at least 1"),
        ({"num_inference_timesteps": 0}, "num_inference_timesteps=0 must be at least 1"),
        ({"max_num_embodiments": 0}, "max_num_embodiments=0 must be at least 1"),
        ({"action_dim": 2.5}, "action_dim.*float"),
        ({"action_dim": 7, "max_action_dim": 32}, "action_dim=7, but max_action_dim=32"),
        ({"noise_s": 0.0}, "noise_s=0.0 must be positive"),
        ({"noise_beta_alpha": float("nan")}, "noise_beta_alpha=nan must be positive"),
        ({"input_embedding_dim": 1537}, "input_embedding_dim=1537 must be even"),
        ({"input_embedding_dim": 100}, "2 of attention_head_dim=48, 96 in all, but input_embedding_dim=100"),
        ({"diffusion_model_cfg": SMALL}, "2 of attention_head_dim=4, 8 in all, but input_embedding_dim=1536"),
        ({"diffusion_model_cfg": SMALL | {"output_dim": 26}, **WIDTHS}, "output_dim=26, but hidden_size=6"),
        ({"diffusion_model_cfg": SMALL | {"dropout": 1.0}, **WIDTHS}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"diffusion_model_cfg": SMALL | {"num_layers": 0}, **WIDTHS}, "num_layers=0 must be at least 1"),
        ({"diffusion_model_cfg": SMALL | {"norm_type": "ada"}, **WIDTHS}, "norm_type.*ada_norm.*got ada"),
        ({"diffusion_model_cfg": SMALL | {"activation_fn": "geglu"}, **WIDTHS}, "activation_fn.*got geglu"),
        (
            {"diffusion_model_cfg": SMALL | {"max_num_positional_embeddings": 16}, **WIDTHS},
            r"17 tokens \(the state, 0 future tokens, action_horizon=16\).*max_num_positional_embeddings=16",
        ),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        FlowmatchingActionHeadConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand_batch": 0}, "expand_batch=0 must be at least 1"),
        ({"num_target_vision_tokens": -1}, "num_target_vision_tokens=-1 must be at least 0"),
        (
            {"diffusion_model_cfg": SMALL | {"cross_attention_dim": 64}, **WIDTHS},
            "cross_attention_dim=64, but backbone_embedding_dim=128",
        ),
        ({"vl_self_attention_cfg": SMALL}, "vl_self_attention_cfg has .*, 8 in all, but backbone_embedding_dim=128"),
        ({"vl_self_attention_cfg": SMALL | {"num_layers": -1}}, "num_layers=-1 must be at least 1"),
    ],
)
def test_refusals_of_n1_5(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        n1_5(**fields)


def test_unused_self_attention_need_not_fit():
    assert not n1_5(use_vlln=False, vl_self_attention_cfg=SMALL).use_vlln


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"acton_dim": 7}, "FlowmatchingActionHeadConfig_1_5 has no field 'acton_dim'. Did you mean 'action_dim'"),
        ({"diffusion_model_cfg": SMALL | {"num_layer": 2}}, "DiTConfig has no field 'num_layer'.*'num_layers'"),
        (
            {"vl_self_attention_cfg": {"cross_attention_dim": 8}},
            "SelfAttentionTransformerConfig has no field 'cross_attention_dim'",
        ),
    ],
)
def test_unknown_fields(fields, message):
    with pytest.raises(UnknownConfigFieldError, match=message):
        n1_5(**fields)


def test_n1_does_not_expand_batches():
    with pytest.raises(UnknownConfigFieldError, match="no field 'expand_batch'"):
        FlowmatchingActionHeadConfig(expand_batch=2)
