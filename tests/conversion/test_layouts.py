"""What every published layout owes: sharded weights, arguments of loading, overrides, adapters on it."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from manipulators import ACTConfig, ACTPolicy, AutoPolicy, PI0Policy, PolicyPipeline, PolicyProcessor
from manipulators.checkpoint import resolve
from manipulators.errors import (
    CheckpointError,
    ConflictingWeightsError,
    InvalidConfigError,
    MissingFileError,
    UnknownConfigFieldError,
    WeightsMismatchError,
)
from manipulators.processing.pi0 import PI0PolicyProcessor
from manipulators.training.tuning import apply_tuning


@pytest.fixture
def lerobot(shared, tmp_path):
    """A copy of LeRobot's ACT checkpoint, to be changed."""
    return shutil.copytree(shared / "golden" / "act_envstate" / "checkpoint", tmp_path / "lerobot")


def split(folder):
    """Write model.safetensors as two shards and their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {f"model-0000{i + 1}-of-00002.safetensors": sorted(weights)[i::2] for i in range(2)}
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_sharded_weights(lerobot):
    expected = AutoPolicy.from_pretrained(lerobot)
    shutil.copy(lerobot / "model.safetensors", lerobot / "kept")
    split(lerobot)
    assert same(PolicyPipeline.from_pretrained(lerobot, device="cpu").policy, expected)
    shutil.move(lerobot / "kept", lerobot / "model.safetensors")
    with pytest.raises(ConflictingWeightsError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        AutoPolicy.from_pretrained(lerobot)


def test_the_file_can_be_overwritten_under_a_loaded_policy(lerobot):
    loaded = AutoPolicy.from_pretrained(lerobot)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    path = lerobot / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\x00" * path.stat().st_size)
        file.truncate(10)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_arguments_of_loading(lerobot):
    weights = load_file(lerobot / "model.safetensors")
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, lerobot / "model.safetensors", {"format": "pt"})
    for load in (AutoPolicy.from_pretrained, ACTPolicy.from_pretrained, PolicyPipeline.from_pretrained):
        with pytest.raises(WeightsMismatchError, match="1 missing"):
            load(lerobot)
        load(lerobot, allow_partial=True, device_map="cpu")
    assert AutoPolicy.from_pretrained(lerobot, allow_partial=True, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UnknownConfigFieldError, match="Did you mean 'allow_partial'"):
        PolicyPipeline.from_pretrained(lerobot, allow_partal=True)


def test_the_class_reads_it_too(lerobot, tmp_path):
    assert same(ACTPolicy.from_pretrained(lerobot), AutoPolicy.from_pretrained(lerobot))
    nested = shutil.copytree(lerobot, tmp_path / "run" / "last")
    pipeline = PolicyPipeline.from_pretrained(tmp_path / "run", subfolder="last", device="cpu")
    assert pipeline.policy.config.name_or_path == str(nested)
    with pytest.raises(Exception, match="holds weights of ACTPolicy, not of PI0Policy"):
        PI0Policy.from_pretrained(lerobot)


def test_other_classes_refuse_it_by_name(lerobot):
    """A config of ours has other fields; transformers' own doors ask for a model_type before any class of ours."""
    with pytest.raises(
        InvalidConfigError, match=r"LeRobot's layout.*AutoPolicy\.from_pretrained.*manipulators convert"
    ):
        ACTConfig.from_pretrained(lerobot)
    with pytest.raises(CheckpointError, match="read by a PolicyProcessor, not by a PI0PolicyProcessor"):
        PI0PolicyProcessor.from_pretrained(lerobot)
    for door in (AutoConfig, AutoModel, AutoProcessor):
        with pytest.raises(ValueError, match="Unrecognized"):
            door.from_pretrained(lerobot)


def test_processor_fields_and_partial_overrides(lerobot):
    saved = PolicyPipeline.from_pretrained(lerobot, device="cpu").processor
    modes = saved.normalization_mapping
    given = {"normalization_mapping": {"VISUAL": "IDENTITY"}, "rename_map": {"env": "observation.environment_state"}}
    for processor in (
        PolicyPipeline.from_pretrained(lerobot, device="cpu", **given).processor,
        PolicyProcessor.from_pretrained(lerobot, **given),
    ):
        assert processor.normalization_mapping == modes | {"VISUAL": "IDENTITY"}
        assert processor.rename_map == {"env": "observation.environment_state"}
        assert processor.statistics == saved.statistics
    with pytest.raises(InvalidConfigError, match="tokenizer= has no use"):
        PolicyPipeline.from_pretrained(lerobot, tokenizer="any")


def test_an_adapter_on_a_published_base(lerobot, tmp_path):
    """Through every door, with overrides, also as peft alone saves it."""
    policy = AutoPolicy.from_pretrained(lerobot)
    apply_tuning(policy, {"tune_diffusion_model": "lora"}, r=2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    policy.save_pretrained(tmp_path / "adapter")
    PolicyPipeline.from_pretrained(lerobot, device="cpu").processor.save_pretrained(tmp_path / "adapter")
    found = resolve(tmp_path / "adapter")
    assert (found.is_adapter, found.layout, found.base.layout.name) == (True, None, "LeRobot")
    for load in (AutoPolicy.from_pretrained, ACTPolicy.from_pretrained, AutoModel.from_pretrained):
        loaded = load(tmp_path / "adapter", n_action_steps=1)
        assert same(loaded, policy)
        assert loaded.config.n_action_steps == 1
    pipeline = PolicyPipeline.from_pretrained(
        tmp_path / "adapter", device="cpu", normalization_mapping={"VISUAL": "IDENTITY"}, n_action_steps=1
    )
    assert pipeline.processor.normalization_mapping["ACTION"] == "MEAN_STD"
    assert (pipeline.policy.config.n_action_steps, same(pipeline.policy, policy)) == (1, True)
    (tmp_path / "adapter" / "config.json").unlink()
    (tmp_path / "adapter" / "adapter_base.json").unlink()
    assert same(AutoPolicy.from_pretrained(tmp_path / "adapter"), policy)


def test_zero_for_false(lerobot):
    """LeRobot writes so what it has loaded and saved again."""
    rewrite(lerobot, pre_norm=0, use_vae=int(json.loads((lerobot / "config.json").read_text())["use_vae"]))
    assert AutoPolicy.from_pretrained(lerobot).config.pre_norm is False


def test_an_older_folder_that_normalises_nothing(lerobot):
    types = ("STATE", "VISUAL", "ENV", "ACTION")
    rewrite(lerobot, normalization_mapping=dict.fromkeys(types, "IDENTITY"))
    for path in lerobot.glob("policy_*"):
        path.unlink()
    assert set(PolicyPipeline.from_pretrained(lerobot, device="cpu").processor.normalization_mapping.values()) == {
        "IDENTITY"
    }


def test_names_that_torch_compile_left_behind(lerobot):
    expected = AutoPolicy.from_pretrained(lerobot)
    weights = load_file(lerobot / "model.safetensors")
    renamed = {name.replace("model.", "model._orig_mod.", 1): value for name, value in weights.items()}
    save_file(renamed, lerobot / "model.safetensors", {"format": "pt"})
    assert same(AutoPolicy.from_pretrained(lerobot), expected)


def test_a_field_that_may_change_the_network_is_refused(lerobot):
    """What is off changes nothing; what only training, publishing or the machine reads is known by name."""
    rewrite(lerobot, use_gated_attention=False, extra_blocks=None, optimizer_foreach=True, push_to_hub=True)
    AutoPolicy.from_pretrained(lerobot)
    rewrite(lerobot, use_gated_attention=True)
    with pytest.raises(InvalidConfigError, match="use_gated_attention=True, which this library does not know"):
        AutoPolicy.from_pretrained(lerobot)


def test_features_that_lerobot_lists_and_never_reads_are_named(lerobot, caplog):
    """Vectors beside the state are left out, with a word; a second state of the environment cannot be LeRobot's."""
    config = json.loads((lerobot / "config.json").read_text())
    effort = {"observation.effort": {"type": "STATE", "shape": [3]}}
    rewrite(lerobot, input_features=config["input_features"] | effort)
    transformers.logging.enable_propagation()
    loaded = AutoPolicy.from_pretrained(lerobot)
    transformers.logging.disable_propagation()
    assert "observation.effort" not in loaded.config.input_features
    assert "config.json lists observation.effort beside observation.state" in caplog.text
    rewrite(lerobot, input_features=config["input_features"] | {"observation.goal": {"type": "ENV", "shape": [3]}})
    with pytest.raises(InvalidConfigError, match=r"'observation\.goal' has type ENV"):
        AutoPolicy.from_pretrained(lerobot)
    rewrite(lerobot, input_features=config["input_features"] | {"observation.state": "sinister"})
    with pytest.raises(InvalidConfigError, match="'sinister' is not a feature"):
        AutoPolicy.from_pretrained(lerobot)


def test_the_published_loss_is_kept(shared, tmp_path):
    """LeRobot's name for it is a property here, which a reader of fields would miss."""
    folder = shutil.copytree(shared / "golden" / "diffusion_envstate" / "checkpoint", tmp_path / "diffusion")
    assert AutoPolicy.from_pretrained(folder).config.loss_over == "steps"
    rewrite(folder, do_mask_loss_for_padding=True)
    assert AutoPolicy.from_pretrained(folder).config.loss_over == "real"


def test_a_policy_without_the_processor_beside_it_is_not_published(lerobot, tmp_path):
    """Its statistics stand in the other project's files, which AutoPolicy does not read."""
    policy = AutoPolicy.from_pretrained(lerobot)
    with pytest.raises(MissingFileError, match=r"layout of LeRobot.*PolicyPipeline\.from_pretrained\(.*push_to_hub"):
        policy.push_to_hub("org/name")
    with pytest.raises(MissingFileError, match="pass processor= here"):
        policy.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/name")
