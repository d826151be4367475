"""A source becomes one checkpoint: one folder, one config, no code; layouts register themselves."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModel, AutoProcessor

from manipulators import ACTPolicy, AutoPolicy, PI0Policy, PolicyPipeline, PolicyProcessor
from manipulators.checkpoint import Checkpoint, Layout, find_layout, register_layout, resolve
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    MissingFileError,
    MissingTokenizerError,
    UnknownConfigFieldError,
    UnknownPolicyError,
)
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

DOORS = {
    "class": ACTPolicy.from_pretrained,
    "AutoPolicy": AutoPolicy.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "PolicyPipeline": PolicyPipeline.from_pretrained,
}


@pytest.fixture(params=DOORS)
def load(request):
    return DOORS[request.param]


def save(folder, config, statistics, seed=0, **processor):
    torch.manual_seed(seed)
    kind = processor_class(config)
    words = {"tokenizer": word_tokenizer(["push the red button"])} if config.reads_instruction else {}
    built = kind.from_config(config, statistics, **words, **processor)
    pipeline = PolicyPipeline(model=AutoPolicy.from_config(config), processor=built, device="cpu")
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture
def folder(tiny_act, statistics_of, tmp_path):
    """A tiny ACT checkpoint whose actions are normalised unlike the class's default."""
    config = tiny_act({"wrist": (3, 32, 32)}, normalization_mapping={"ACTION": "MIN_MAX"})
    save(tmp_path / "act", config, statistics_of(config), dimension_names={"action": ["x", "y"]})
    return tmp_path / "act"


@pytest.fixture
def words(tiny_pi0, statistics_of, tmp_path):
    """A tiny π0 checkpoint, with a tokenizer."""
    config = tiny_pi0()
    save(tmp_path / "pi0", config, statistics_of(config))
    return tmp_path / "pi0"


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- where it is ------------------------------------------------------------------------------------------


def test_what_a_folder_resolves_to(folder):
    found = resolve(folder)
    assert (found.source, found.folder, found.layout, found.base) == (str(folder), folder, None, None)
    assert (found.is_adapter, found.commit, found.config["model_type"]) == (False, None, "act_policy")
    assert resolve(found) is found
    with pytest.raises(InvalidConfigError, match="revisions: not among cache_dir"):
        resolve(folder, revisions="main")


def test_a_subfolder_is_loaded_whole(folder, tiny_act, statistics_of):
    """Weights and statistics of the subfolder, whatever the root holds, through every door."""
    config = tiny_act({"wrist": (3, 32, 32)}, chunk_size=7)
    statistics = statistics_of(config) | {"action": {"mean": [9.0, 9.0], "std": [1.0, 1.0]}}
    inner = save(folder / "last", config, statistics, seed=1)
    pipelines = [
        PolicyPipeline.from_pretrained(folder, subfolder="last", device="cpu"),
        PolicyPipeline(
            model=AutoModel.from_pretrained(folder, subfolder="last"),
            processor=AutoProcessor.from_pretrained(folder, subfolder="last"),
            device="cpu",
        ),
        PolicyPipeline(
            model=AutoPolicy.from_pretrained(folder, subfolder="last"),
            processor=PolicyProcessor.from_pretrained(folder, subfolder="last"),
            device="cpu",
        ),
    ]
    observation = {"observation.images.wrist": torch.ones(3, 32, 32), "observation.state": [0.0, 1.0, 2.0]}
    expected = inner.predict_chunk(observation)
    assert expected.shape == (7, 2)
    for pipeline in pipelines:
        torch.testing.assert_close(pipeline.predict_chunk(observation), expected)
    with pytest.raises(MissingFileError, match=r"no subfolder 'first'; it holds config\.json, last"):
        PolicyPipeline.from_pretrained(folder, subfolder="first")


def test_the_class_of_another_policy(folder):
    with pytest.raises(InvalidConfigError, match="'act_policy', but PI0PolicyConfig reads"):
        PI0Policy.from_pretrained(folder)


# --- no code ----------------------------------------------------------------------------------------------


def test_no_code_is_fetched_or_run(load, folder):
    for argument in ("trust_remote_code", "use_kernels", "allow_all_kernels"):
        with pytest.raises(CheckpointError, match=f"{argument}=True is refused: no code"):
            load(folder, **{argument: True})
    with pytest.raises(CheckpointError, match="'org/kernel' would download code"):
        load(folder, attn_implementation="org/kernel")
    rewrite(folder / "config.json", vision_config={"layer_type": "basic", "attn_implementation": "org/kernel@main"})
    with pytest.raises(CheckpointError, match="'org/kernel@main' would download code"):
        load(folder)


def test_config_cannot_name_other_weights(load, folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    rewrite(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers_weights='other\.safetensors', which is refused"):
        load(folder)


def test_a_tokenizer_with_code_is_not_asked_about(words, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    code = {"AutoTokenizer": ["tokenization.Mine", "tokenization.Mine"]}
    rewrite(words / "tokenizer_config.json", auto_map=code, tokenizer_class="Mine")
    try:
        processor = PolicyPipeline.from_pretrained(words, device="cpu").processor
    except OSError as error:  # refused by name is as well
        assert "trust_remote_code" in str(error)
    else:
        assert processor.tokenizer("push").input_ids


# --- arguments --------------------------------------------------------------------------------------------


def test_a_partial_override_keeps_the_rest_of_what_is_saved(load, folder):
    loaded = load(folder, normalization_mapping={"VISUAL": "IDENTITY"})
    policy = getattr(loaded, "policy", loaded)
    modes = {kind: mode.value for kind, mode in policy.config.normalization_mapping.items()}
    assert modes == {"STATE": "MEAN_STD", "VISUAL": "IDENTITY", "ENV": "MEAN_STD", "ACTION": "MIN_MAX"}
    if isinstance(loaded, PolicyPipeline):
        assert loaded.processor.normalization_mapping == modes


def test_a_nested_override_keeps_the_rest_of_what_is_saved(tiny_gr00t_n1_5, statistics_of, tmp_path):
    config = tiny_gr00t_n1_5(tune_llm=True)
    save(tmp_path, config, statistics_of(config))
    loaded = AutoPolicy.from_pretrained(tmp_path, backbone_cfg={"tune_visual": False}).config
    assert loaded.backbone_cfg == config.backbone_cfg | {"tune_visual": False}
    assert loaded.tune_llm is True


def test_an_override_repairs_a_config_that_is_refused_as_saved(load, folder):
    rewrite(folder / "config.json", n_action_steps=99)
    with pytest.raises(InvalidConfigError, match="99"):
        load(folder)
    loaded = load(folder, n_action_steps=2)
    assert getattr(loaded, "policy", loaded).config.n_action_steps == 2


def test_processor_fields_are_honoured(folder):
    for load in (
        lambda **fields: PolicyPipeline.from_pretrained(folder, device="cpu", **fields).processor,
        lambda **fields: PolicyProcessor.from_pretrained(folder, **fields),
        lambda **fields: AutoProcessor.from_pretrained(folder, **fields),
    ):
        processor = load(
            relative_to=[0, None],
            rename_map={"cam": "observation.images.wrist"},
            dimension_names={"action": ["u", "v"]},
        )
        assert processor.relative_to == [0, None]
        assert processor.rename_map == {"cam": "observation.images.wrist"}
        assert processor.dimension_names == {"action": ["u", "v"]}


def test_a_processor_field_is_no_argument_of_a_policy(folder):
    for load in (ACTPolicy.from_pretrained, AutoPolicy.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(UnknownConfigFieldError, match="relative_to"):
            load(folder, relative_to=[0, None])


def test_unknown_arguments_are_refused_by_name(folder):
    for load in (PolicyPipeline.from_pretrained, PolicyProcessor.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(UnknownConfigFieldError, match=r"'relativ_to'\. Did you mean 'relative_to'"):
            load(folder, relativ_to=[0, None])
    with pytest.raises(InvalidConfigError, match="base= is for adapters"):
        AutoPolicy.from_pretrained(folder, base=folder)


def test_another_tokenizer(words, folder):
    other = word_tokenizer(["lift the lid"])
    loaded = PolicyPipeline.from_pretrained(words, device="cpu", tokenizer=other).processor.tokenizer
    assert loaded.get_vocab() == other.get_vocab()
    assert "push" in PolicyPipeline.from_pretrained(words, device="cpu").processor.tokenizer.get_vocab()
    with pytest.raises(InvalidConfigError, match="tokenizer= has no use"):
        PolicyPipeline.from_pretrained(folder, tokenizer=other)


def test_transformers_pipeline_takes_what_ours_takes(folder):
    pipeline = transformers.pipeline(
        "robotics", str(folder), device="cpu", camera_map={"cam": "wrist"}, model_kwargs={"n_action_steps": 1}
    )
    assert pipeline.processor.rename_map == {"observation.images.cam": "observation.images.wrist"}
    assert pipeline.policy.config.n_action_steps == 1


def test_what_this_machine_has_not(load, folder):
    for dtype in ("bf16", "int8", torch.int32, 3):
        with pytest.raises(InvalidConfigError, match="is not a type of weights"):
            load(folder, dtype=dtype)
    with pytest.raises(InvalidConfigError, match=r"no device 'xpu:7' here; there is cpu"):
        load(folder, device_map="xpu:7")
    with pytest.raises(InvalidConfigError, match="no device 'xpu:7' here"):
        PolicyPipeline.from_pretrained(folder, device="xpu:7")


@pytest.mark.parametrize(
    "load", [AutoPolicy.from_pretrained, PolicyPipeline.from_pretrained, ACTPolicy.from_pretrained]
)
def test_deeply_nested_json(load, folder):
    (folder / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CorruptFileError, match=r"config\.json is not a readable JSON"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 3}', '{"model": {"type": "BPE", "vocab": 7}}', "\x00"])
def test_a_damaged_tokenizer(words, content):
    (words / "tokenizer.json").write_text(content)
    with pytest.raises(MissingTokenizerError, match="pi0"):
        PolicyPipeline.from_pretrained(words)


# --- layouts ----------------------------------------------------------------------------------------------


def test_a_layout_registers_itself(folder, monkeypatch, tmp_path):
    """Every door reads it then: here a project that calls our fields by one other name."""
    monkeypatch.setattr("manipulators.checkpoint._LAYOUTS", {})

    def read(checkpoint: Checkpoint, *, loading, processor_fields=None, with_processor=True, **options):
        assert options.keys() <= {"tokenizer", "arm", "chunk_size"}
        config = {"model_type": "act_policy"} | checkpoint.config["fields"]
        policy = ACTPolicy.from_pretrained(
            None,
            config=ACTPolicy.config_class.from_dict(config),
            state_dict=ACTPolicy.from_pretrained(folder).state_dict(),
        )
        return policy, PolicyProcessor.from_pretrained(folder) if with_processor else None

    register_layout(
        Layout("toy", lambda config: "fields" in config, lambda config: ACTPolicy, read, arguments=("arm",))
    )
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(
        json.dumps({"fields": json.loads((folder / "config.json").read_text())})
    )
    assert find_layout({"fields": {}}).name == "toy"
    source = tmp_path / "toy"
    assert type(AutoPolicy.from_pretrained(source)) is ACTPolicy
    assert ACTPolicy.from_pretrained(source).config.name_or_path == str(source)
    assert PolicyPipeline.from_pretrained(source, arm="left", device="cpu").policy.loaded_from.layout.name == "toy"
    assert type(PolicyProcessor.from_pretrained(source)) is PolicyProcessor
    with pytest.raises(UnknownPolicyError, match="holds weights of ACTPolicy, not of PI0Policy"):
        PI0Policy.from_pretrained(source)
