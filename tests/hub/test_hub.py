"""Publishing to a Hub and loading from it by id, over HTTP."""

import json

import pytest
import yaml
from safetensors.torch import load

from manipulators.hub_cards.edits import was_edited
from manipulators.hub_cards.lint import lint_card

KEY = "models/your-lab/act-tiny"
BUILD = """
import torch
from manipulators import ACTConfig, ACTPolicy, AutoPolicy, PolicyPipeline, PolicyProcessor
from transformers import AutoModel, AutoProcessor

torch.manual_seed(0)
config = ACTConfig(
    chunk_size=4, n_action_steps=2, dim_model=16, n_heads=2, dim_feedforward=32, n_encoder_layers=1, use_vae=False,
    input_features={"observation.state": {"type": "STATE", "shape": [3]}},
    output_features={"action": {"type": "ACTION", "shape": [2]}},
)
policy = ACTPolicy(config).eval()
statistics = {
    "observation.state": {"mean": [0.0, 1.0, 2.0], "std": [1.0, 2.0, 3.0], "min": [-5.0] * 3, "max": [5.0] * 3},
    "action": {"mean": [1.0, -1.0], "std": [2.0, 0.5], "min": [-9.0] * 2, "max": [9.0] * 2},
}
processor = PolicyProcessor.from_config(config, statistics)
observation = {"observation.state": torch.tensor([0.5, -1.0, 2.0])}
def answer(pipeline):
    return pipeline.predict_chunk(observation).tolist()
expected = answer(PolicyPipeline(model=policy, processor=processor, device="cpu"))
"""


def test_publishing_and_loading_by_id_and_then_from_the_cache(hub, client):
    said = client(
        BUILD
        + """
url = policy.push_to_hub("your-lab/act-tiny", processor=processor)
report({
    "url": url,
    "expected": expected,
    "pipeline": answer(PolicyPipeline.from_pretrained("your-lab/act-tiny", device="cpu")),
    "types": [
        type(AutoPolicy.from_pretrained("your-lab/act-tiny")).__name__,
        type(AutoModel.from_pretrained("your-lab/act-tiny")).__name__,
        type(AutoProcessor.from_pretrained("your-lab/act-tiny")).__name__,
    ],
    "mean": AutoProcessor.from_pretrained("your-lab/act-tiny").statistics["action"]["mean"],
})
"""
    )
    assert said["url"] == f"{hub.url}/your-lab/act-tiny/commit/{hub.head(KEY)}"
    assert hub.commits[KEY] == 1  # everything in one commit: nobody downloads half of it

    files = hub.repositories[KEY]
    assert set(files) == {"config.json", "model.safetensors", "processor_config.json", "README.md"}
    assert json.loads(files["config.json"])["model_type"] == "act_policy"
    assert json.loads(files["processor_config.json"])["statistics"]["action"]["std"] == [2.0, 0.5]
    assert load(files["model.safetensors"])["action_head.action_head.weight"].shape == (2, 16)

    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "manipulators"
    assert metadata["pipeline_tag"] == "robotics"
    assert lint_card(card) == []
    assert not was_edited(card)
    assert 'PolicyPipeline.from_pretrained("your-lab/act-tiny")' in card

    assert said["pipeline"] == [pytest.approx(row, abs=1e-6) for row in said["expected"]]
    assert len(said["pipeline"]) == 4
    assert said["types"] == ["ACTPolicy", "ACTPolicy", "PolicyProcessor"]
    assert said["mean"] == [1.0, -1.0]

    # The Hub is gone; what was loaded before still loads.
    hub.stop()
    offline = client(
        """
import torch
from manipulators import AutoPolicy, PolicyPipeline
observation = {"observation.state": torch.tensor([0.5, -1.0, 2.0])}
pipeline = PolicyPipeline.from_pretrained("your-lab/act-tiny", device="cpu", local_files_only=True)
auto = AutoPolicy.from_pretrained("your-lab/act-tiny", local_files_only=True)
try:
    PolicyPipeline.from_pretrained("your-lab/another", local_files_only=True)
except Exception as error:
    problem = type(error).__name__
report([pipeline.predict_chunk(observation).tolist(), type(auto).__name__, problem])
"""
    )
    assert offline == [said["pipeline"], "ACTPolicy", "MissingFileError"]


def test_an_edited_card_is_kept_and_our_own_is_replaced(hub, client):
    edited = b"---\nlibrary_name: manipulators\nlicense: mit\n---\n\nMeasured on my own arm.\n"
    hub.put("models/your-lab/edited", "README.md", edited)
    hub.put("models/your-lab/other", ".gitattributes", b"")
    client(
        BUILD
        + """
policy.push_to_hub("your-lab/edited", processor=processor)
policy.push_to_hub("your-lab/ours")  # without statistics
policy.push_to_hub("your-lab/ours", processor=processor)
policy.push_to_hub("your-lab/other", processor=processor, card="---\\nlicense: mit\\n---\\nMine.\\n")
report(None)
"""
    )
    assert hub.repositories["models/your-lab/edited"]["README.md"] == edited
    assert "model.safetensors" in hub.repositories["models/your-lab/edited"]
    ours = hub.repositories["models/your-lab/ours"]["README.md"].decode()
    assert "to mean 0, standard deviation 1" in ours  # the second card, with its statistics
    assert not was_edited(ours)
    assert hub.commits["models/your-lab/ours"] == 2
    assert b"Mine." in hub.repositories["models/your-lab/other"]["README.md"]


def test_a_published_lerobot_checkpoint_loads_by_id(hub, client, shared):
    folder = shared / "golden" / "act_envstate" / "checkpoint"
    hub.put_folder("models/someone/act-lerobot", folder)
    hub.put("models/someone/act-lerobot", "pytorch_model.bin", b"never fetched")
    said = client(
        f"""
import torch
from manipulators import AutoPolicy, PolicyPipeline
by_id = PolicyPipeline.from_pretrained("someone/act-lerobot", device="cpu")
local = PolicyPipeline.from_pretrained({str(folder)!r}, device="cpu")
observation = {{n: torch.linspace(-1, 1, f.shape[0]) for n, f in local.policy.config.input_features.items()}}
cached = AutoPolicy.from_pretrained("someone/act-lerobot", local_files_only=True)
report({{
    "same": torch.equal(by_id.predict_chunk(observation), local.predict_chunk(observation)),
    "size": by_id.predict_chunk(observation).numel(),
    "cached": all(torch.equal(v, cached.state_dict()[n]) for n, v in local.policy.state_dict().items()),
}})
"""
    )
    assert said["same"] is True
    assert said["size"] > 0
    assert said["cached"] is True
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_what_is_not_there_is_one_of_our_errors(hub, client):
    hub.put("models/your-lab/empty", "README.md", b"nothing here")
    hub.put("models/your-lab/weightless", "config.json", b'{"model_type": "act_policy"}')
    said = client(
        BUILD
        + """
from manipulators.errors import ManipulatorsError
problems = {}
for source in ("your-lab/nowhere", "your-lab/empty", "your-lab/weightless"):
    try:
        PolicyPipeline.from_pretrained(source)
    except Exception as error:
        problems[source] = [type(error).__name__, isinstance(error, ManipulatorsError), source in str(error)]
report(problems)
"""
    )
    assert said["your-lab/nowhere"] == ["MissingFileError", True, True]
    assert said["your-lab/empty"] == ["MissingFileError", True, True]
    assert said["your-lab/weightless"][1:] == [True, True]


DATASET = """
import glob, os, torch
from manipulators import LeRobotDataset
local = LeRobotDataset({folder!r}, action_horizon=2)
def same(dataset, names):
    return len(dataset) == len(local) > 0 and all(
        torch.equal(dataset[i][name], local[i][name]) for i in (0, len(local) - 1) for name in names
    )
def videos():
    return len(glob.glob(os.environ["HF_HOME"] + "/**/*.mp4", recursive=True))
"""


def test_a_dataset_loads_by_id_and_then_from_the_cache(hub, client, shared):
    folder = shared / "data" / "lerobot_v3_tiny"
    hub.put_folder("datasets/someone/tiny", folder)
    start = DATASET.format(folder=str(folder))
    said = client(
        start
        + """
numbers = [name for name in local.features if name not in local.camera_names]
chosen = LeRobotDataset("someone/tiny", action_horizon=2, features=numbers)
before = [same(chosen, ["observation.state", "action", "action_is_pad"]), videos()]
whole = LeRobotDataset("someone/tiny", action_horizon=2)
report([*before, len(local.camera_names) > 0, same(whole, local.camera_names), videos() > 0])
"""
    )
    # Without cameras no video is fetched; with them, they are.
    assert said == [True, 0, True, True, True]

    hub.stop()
    whole = """
whole = LeRobotDataset("someone/tiny", action_horizon=2)
report(same(whole, ["observation.state", "action", *local.camera_names]))
"""
    assert client(start + whole) is True


def test_an_adapter_and_its_base_load_by_id(hub, client):
    said = client(
        BUILD
        + """
from manipulators.training.tuning import apply_tuning
policy.push_to_hub("your-lab/act-tiny", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/act-tiny")
apply_tuning(tuned, {"tune_projector": True, "tune_diffusion_model": "lora"}, r=2)
with torch.no_grad():
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
tuned.eval().push_to_hub("your-lab/act-adapter", processor=processor)
report({
    "tuned": answer(PolicyPipeline(model=tuned, processor=processor, device="cpu")),
    "pipeline": answer(PolicyPipeline.from_pretrained("your-lab/act-adapter", device="cpu")),
    "parts": list(tuned.parameter_parts),
    "base": expected,
})
"""
    )
    files = hub.repositories["models/your-lab/act-adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json"} < set(files)
    assert "model.safetensors" not in files
    assert json.loads(files["adapter_base.json"])["revision"] == hub.head(KEY)
    assert "base_model: your-lab/act-tiny" in files["README.md"].decode()
    assert said["pipeline"] == said["tuned"] != said["base"]

    # The base goes on; the adapter stays with the commit it was trained on, also without a network.
    hub.put(KEY, "model.safetensors", b"another base")
    load_again = """
import torch
from manipulators import PolicyPipeline
pipeline = PolicyPipeline.from_pretrained("your-lab/act-adapter", device="cpu")
report(pipeline.predict_chunk({"observation.state": torch.tensor([0.5, -1.0, 2.0])}).tolist())
"""
    assert client(load_again) == said["tuned"]
    hub.stop()
    assert client(load_again.replace('device="cpu")', 'device="cpu", local_files_only=True)', 1)) == said["tuned"]


def test_only_the_files_of_one_checkpoint_are_downloaded(hub, client, shared):
    """Neither checkpoints inside it nor states of an optimizer; of a subfolder, that subfolder alone."""
    golden = shared / "golden" / "act_envstate" / "checkpoint"
    hub.put_folder("models/someone/run", golden)
    for path in golden.iterdir():
        hub.put("models/someone/run", f"checkpoints/last/{path.name}", path.read_bytes())
    for name in ("optimizer.pt", "optimizer.safetensors", "ema.safetensors", "videos/a.mp4", "training_args.bin"):
        hub.put("models/someone/run", name, b"never fetched")
    said = client(
        """
import os
from pathlib import Path
from manipulators import PolicyPipeline
def held():
    return sorted(p.relative_to(root).as_posix() for root in Path(os.environ["HF_HOME"]).glob("hub/*/snapshots/*")
                  for p in root.rglob("*") if p.is_file())
root = PolicyPipeline.from_pretrained("someone/run", device="cpu")
first = held()
inner = PolicyPipeline.from_pretrained("someone/run", subfolder="checkpoints/last", device="cpu")
commits = [root.policy.loaded_from.commit, inner.policy.loaded_from.commit]
report([first, held(), commits, inner.policy.config._commit_hash])
"""
    )
    top = {path.name for path in golden.iterdir()}
    assert set(said[0]) <= top
    assert {"config.json", "model.safetensors", "policy_preprocessor.json"} <= set(said[0])
    assert set(said[1]) == set(said[0]) | {f"checkpoints/last/{name}" for name in said[0]}
    assert said[2] == [hub.head("models/someone/run")] * 2
    assert said[3] == said[2][0]


def test_transformers_pipeline_of_an_adapter_takes_the_adapters_processor(hub, client):
    """The one of its base has other statistics."""
    said = client(
        BUILD
        + """
import transformers
from manipulators.training.tuning import apply_tuning
policy.push_to_hub("your-lab/act-tiny", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/act-tiny")
apply_tuning(tuned, {"tune_diffusion_model": "lora"}, r=2)
mine = PolicyProcessor.from_config(config, statistics | {"action": {"mean": [7.0, 7.0], "std": [1.0, 1.0]}})
tuned.push_to_hub("your-lab/act-adapter", processor=mine)
pipeline = transformers.pipeline("robotics", "your-lab/act-adapter", device="cpu")
loaded = AutoModel.from_pretrained("your-lab/act-adapter")
report([pipeline.processor.statistics["action"]["mean"], type(loaded).__name__])
"""
    )
    assert said == [[7.0, 7.0], "ACTPolicy"]


def test_pushing_replaces_the_weights_that_were_there(hub, client):
    client(
        BUILD
        + """
from manipulators.training.tuning import apply_tuning
policy.push_to_hub("your-lab/act-tiny", processor=processor)
policy.push_to_hub("your-lab/other", processor=processor, max_shard_size=10_000)
policy.push_to_hub("your-lab/again", processor=processor, max_shard_size=10_000)
policy.push_to_hub("your-lab/again", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/act-tiny")
apply_tuning(tuned, {"tune_diffusion_model": "lora"}, r=2)
tuned.push_to_hub("your-lab/other", processor=processor)
tuned.push_to_hub("your-lab/act-tiny", processor=processor)
policy.push_to_hub("your-lab/act-tiny", processor=processor)
report(None)
"""
    )

    def weights(name):
        return {file for file in hub.repositories[f"models/your-lab/{name}"] if file.startswith(("model", "adapter"))}

    adapter = {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json"}
    assert weights("other") == adapter
    assert weights("again") == weights("act-tiny") == {"model.safetensors"}
