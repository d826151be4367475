"""The Eagle configs: completed by the published sizes, and what is refused."""

import json

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, SiglipVisionConfig

from manipulators import EagleConfig, EagleConfig1_5
from manipulators.errors import InvalidConfigError, UnknownConfigFieldError

TINY_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TINY_LANGUAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
both = pytest.mark.parametrize("kind", [EagleConfig, EagleConfig1_5])


def test_published_sizes():
    n1, n1_5 = EagleConfig(), EagleConfig1_5()
    for config in (n1, n1_5):
        vision = config.vision_config
        assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1152, 4304, 27)
        assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
        assert (vision.hidden_act, vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
        assert vision.vision_use_head is False
    llama, qwen = n1.llm_config, n1_5.text_config
    assert (llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers) == (2048, 8192, 24)
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.vocab_size) == (32, 32, 49164)
    assert (llama.rms_norm_eps, llama.rope_parameters["rope_theta"], llama.hidden_act) == (1e-5, 130000, "silu")
    assert (qwen.hidden_size, qwen.intermediate_size, qwen.num_hidden_layers) == (2048, 6144, 28)
    assert (qwen.num_attention_heads, qwen.num_key_value_heads, qwen.head_dim) == (16, 8, 128)
    assert (qwen.rms_norm_eps, qwen.rope_parameters["rope_theta"], qwen.vocab_size) == (1e-6, 1000000, 151680)
    assert (n1.image_tokens(), n1_5.image_tokens(), n1_5.image_token_index) == (64, 256, 151669)
    assert EagleConfig1_5(use_pixel_shuffle=True).image_tokens() == 64
    assert n1.image_tokens(scale=2) == 256


@both
def test_parts_as_mappings_or_configs(kind):
    language_class = {EagleConfig: LlamaConfig, EagleConfig1_5: Qwen3Config}[kind]
    given = kind.of({"vision_config": TINY_VISION, kind.language_field: TINY_LANGUAGE | {"rope_theta": 500}})
    assert given.language_config.hidden_size == 32 and given.language_config.rope_parameters["rope_theta"] == 500
    assert given.force_image_size == 28
    as_configs = kind.of(
        {
            "vision_config": SiglipVisionConfig(**given.fields()["vision_config"]),
            kind.language_field: language_class(**given.fields()[kind.language_field]),
        }
    )
    assert as_configs.fields() == given.fields()
    assert kind.of(PreTrainedConfig(**given.fields())).fields() == given.fields()
    assert kind.of(given) is given


@both
def test_fields_are_json_and_read_again(kind):
    fields = kind.of({"vision_config": TINY_VISION, kind.language_field: TINY_LANGUAGE}).fields()
    assert kind.of(json.loads(json.dumps(fields))).fields() == fields
    fields[kind.language_field]["num_hidden_layers"] = 7  # what follows from it was not saved
    assert kind.of(fields).language_config.num_hidden_layers == 7


@both
def test_the_first_layers(kind):
    config = kind.of({kind.language_field: TINY_LANGUAGE})
    assert config.truncated_language_config(3).num_hidden_layers == 3
    assert config.truncated_language_config(5).num_hidden_layers == 5
    assert config.language_config.num_hidden_layers == 5
    for layers in (0, -1, 6):
        with pytest.raises(InvalidConfigError, match=rf"select_layer={layers}: .* 1 to 5.*\n?.*Pass select_layer=5"):
            config.truncated_language_config(layers)


def test_sliding_windows_are_truncated_with_their_layers():
    text = TINY_LANGUAGE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    config = EagleConfig1_5(text_config=text)
    assert config.truncated_language_config(3).layer_types == ["full_attention"] * 2 + ["sliding_attention"]


def test_another_language_model_starts_from_its_own_defaults():
    config = EagleConfig1_5(text_config={"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    assert isinstance(config.text_config, LlamaConfig) and config.text_config.head_dim == 16
    with pytest.raises(InvalidConfigError, match=r"text_config has model_type='gpt2'.*qwen3"):
        EagleConfig1_5(text_config={"model_type": "gpt2"})
    with pytest.raises(InvalidConfigError, match="vision_config has model_type='clip'"):
        EagleConfig(vision_config={"model_type": "clip"})


@both
def test_unknown_names(kind):
    for fields, name, near in (
        ({"downsample_rate": 0.5}, "downsample_rate", "downsample_ratio"),
        ({"vision_config": {"num_hiden_layers": 2}}, "num_hiden_layers", "num_hidden_layers"),
        ({kind.language_field: {"hidden_sise": 2}}, "hidden_sise", "hidden_size"),
    ):
        with pytest.raises(UnknownConfigFieldError, match=f"no field '{name}'. Did you mean '{near}'"):
            kind.of(fields)
    other = {EagleConfig: "text_config", EagleConfig1_5: "llm_config"}[kind]
    with pytest.raises(UnknownConfigFieldError, match=other):
        kind.of({other: {}})


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (EagleConfig, {"select_layer": -2}, "select_layer=-2"),
        (EagleConfig, {"ps_version": "v1"}, "ps_version='v1'"),
        (EagleConfig, {"pre_feature_reduction": True}, "pre_feature_reduction=True"),
        (EagleConfig, {"use_llm_lora": 8}, "use_llm_lora=8"),
        (EagleConfig, {"downsample_ratio": 0.4}, "downsample_ratio=0.4 must be 1/k"),
        (EagleConfig, {"downsample_ratio": 1 / 3}, "stacks 3 × 3 patches.*16 × 16"),
        (EagleConfig, {"force_image_size": 448}, "force_image_size=448.*image_size=224"),
        (EagleConfig, {"vision_config": {"image_size": [224, 224]}}, "one side of each"),
        (EagleConfig, {"vision_config": {"hidden_size": "wide"}}, "vision_config.*hidden_size"),
        (EagleConfig1_5, {"mlp_connector_layers": 3}, "mlp_connector_layers=3"),
        (EagleConfig1_5, {"use_pixel_shuffle": "yes"}, "use_pixel_shuffle"),
    ],
)
def test_what_is_refused(kind, fields, match):
    with pytest.raises(InvalidConfigError, match=match):
        kind.of(fields)
