"""Publishing to a Hub and loading from it by id, over HTTP.

Three processes do what the tests look at: `online` publishes and loads; `later` loads again when a base has changed;
`offline` loads from the cache when the Hub is gone. What each does for a test stands beside that test.
"""

import json

import pytest
import yaml
from safetensors.torch import load

from manipulators.hub_cards.edits import was_edited
from manipulators.hub_cards.lint import lint_card

KEY = "models/your-lab/act-tiny"
BASE = "models/your-lab/act-base"
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
LOAD = """
import torch
from manipulators import AutoPolicy, LeRobotDataset, PolicyPipeline
observation = {"observation.state": torch.tensor([0.5, -1.0, 2.0])}
"""


@pytest.fixture(scope="module")
def online(hub, client, shared):
    """What the first process was told, and under `heads` where it left the repositories."""
    hub.put("models/your-lab/edited", "README.md", EDITED)
    hub.put("models/your-lab/other", ".gitattributes", b"")
    hub.put("models/your-lab/empty", "README.md", b"nothing here")
    hub.put("models/your-lab/weightless", "config.json", b'{"model_type": "act_policy"}')
    hub.put_folder("models/someone/act-lerobot", shared / "golden" / "act_envstate" / "checkpoint")
    hub.put("models/someone/act-lerobot", "pytorch_model.bin", b"never fetched")
    put_run(hub, shared / "golden" / "act_envstate" / "checkpoint")
    hub.put_folder("datasets/someone/tiny", shared / "data" / "lerobot_v3_tiny")
    said = client(
        BUILD,
        publishing=PUBLISHING,
        cards=CARDS,
        published=PUBLISHED.format(folder=str(shared / "golden" / "act_envstate" / "checkpoint")),
        absent=ABSENT,
        dataset=dataset_code(shared, DATASET_BY_ID),
        adapter=ADAPTER,
        files=FILES,
        processors=PROCESSORS,
        replacing=REPLACING,
    )
    said["heads"] = {key: hub.head(key) for key in hub.repositories}
    return said


@pytest.fixture(scope="module")
def later(hub, client, online):
    """What the second process was told: the base has gone on since."""
    hub.put(BASE, "model.safetensors", b"another base")
    return client(LOAD, adapter=LOAD_ADAPTER)


@pytest.fixture(scope="module")
def offline(hub, client, shared, later):
    """What the third process was told: there is no Hub any more."""
    hub.stop()
    adapter = LOAD_ADAPTER.replace('device="cpu"', 'device="cpu", local_files_only=True')
    return client(
        LOAD, publishing=FROM_THE_CACHE, dataset=dataset_code(shared, DATASET_FROM_THE_CACHE), adapter=adapter
    )


PUBLISHING = """
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
FROM_THE_CACHE = """
pipeline = PolicyPipeline.from_pretrained("your-lab/act-tiny", device="cpu", local_files_only=True)
auto = AutoPolicy.from_pretrained("your-lab/act-tiny", local_files_only=True)
try:
    PolicyPipeline.from_pretrained("your-lab/another", local_files_only=True)
except Exception as error:
    problem = type(error).__name__
report([pipeline.predict_chunk(observation).tolist(), type(auto).__name__, problem])
"""


def test_publishing_and_loading_by_id_and_then_from_the_cache(hub, online, offline):
    said = online["publishing"]
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
    assert offline["publishing"] == [said["pipeline"], "ACTPolicy", "MissingFileError"]


EDITED = b"---\nlibrary_name: manipulators\nlicense: mit\n---\n\nMeasured on my own arm.\n"
CARDS = """
policy.push_to_hub("your-lab/edited", processor=processor)
policy.push_to_hub("your-lab/ours")  # without statistics
policy.push_to_hub("your-lab/ours", processor=processor)
policy.push_to_hub("your-lab/other", processor=processor, card="---\\nlicense: mit\\n---\\nMine.\\n")
report("done")
"""


def test_an_edited_card_is_kept_and_our_own_is_replaced(hub, online):
    assert online["cards"] == "done"
    assert hub.repositories["models/your-lab/edited"]["README.md"] == EDITED
    assert "model.safetensors" in hub.repositories["models/your-lab/edited"]
    ours = hub.repositories["models/your-lab/ours"]["README.md"].decode()
    assert "to mean 0, standard deviation 1" in ours  # the second card, with its statistics
    assert not was_edited(ours)
    assert hub.commits["models/your-lab/ours"] == 2
    assert b"Mine." in hub.repositories["models/your-lab/other"]["README.md"]


PUBLISHED = """
by_id = PolicyPipeline.from_pretrained("someone/act-lerobot", device="cpu")
local = PolicyPipeline.from_pretrained({folder!r}, device="cpu")
raw = {{n: torch.linspace(-1, 1, f.shape[0]) for n, f in local.policy.config.input_features.items()}}
cached = AutoPolicy.from_pretrained("someone/act-lerobot", local_files_only=True)
report({{
    "same": torch.equal(by_id.predict_chunk(raw), local.predict_chunk(raw)),
    "size": by_id.predict_chunk(raw).numel(),
    "cached": all(torch.equal(v, cached.state_dict()[n]) for n, v in local.policy.state_dict().items()),
}})
"""


def test_a_published_lerobot_checkpoint_loads_by_id(hub, online):
    said = online["published"]
    assert said["same"] is True
    assert said["size"] > 0
    assert said["cached"] is True
    assert not any("pytorch_model.bin" in request for request in hub.requests)


ABSENT = """
from manipulators.errors import ManipulatorsError
problems = {}
for source in ("your-lab/nowhere", "your-lab/empty", "your-lab/weightless"):
    try:
        PolicyPipeline.from_pretrained(source)
    except Exception as error:
        problems[source] = [type(error).__name__, isinstance(error, ManipulatorsError), source in str(error)]
report(problems)
"""


def test_what_is_not_there_is_one_of_our_errors(online):
    said = online["absent"]
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


DATASET_BY_ID = """
numbers = [name for name in local.features if name not in local.camera_names]
chosen = LeRobotDataset("someone/tiny", action_horizon=2, features=numbers)
before = [same(chosen, ["observation.state", "action", "action_is_pad"]), videos()]
whole = LeRobotDataset("someone/tiny", action_horizon=2)
report([*before, len(local.camera_names) > 0, same(whole, local.camera_names), videos() > 0])
"""
DATASET_FROM_THE_CACHE = """
whole = LeRobotDataset("someone/tiny", action_horizon=2)
report(same(whole, ["observation.state", "action", *local.camera_names]))
"""


def dataset_code(shared, code):
    return DATASET.format(folder=str(shared / "data" / "lerobot_v3_tiny")) + code


def test_a_dataset_loads_by_id_and_then_from_the_cache(online, offline):
    # Without cameras no video is fetched; with them, they are.
    assert online["dataset"] == [True, 0, True, True, True]
    assert offline["dataset"] is True


ADAPTER = """
from manipulators.training.tuning import apply_tuning
policy.push_to_hub("your-lab/act-base", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/act-base")
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
LOAD_ADAPTER = """
pipeline = PolicyPipeline.from_pretrained("your-lab/act-adapter", device="cpu")
report(pipeline.predict_chunk(observation).tolist())
"""


def test_an_adapter_and_its_base_load_by_id(hub, online, later, offline):
    said = online["adapter"]
    files = hub.repositories["models/your-lab/act-adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json"} < set(files)
    assert "model.safetensors" not in files
    assert json.loads(files["adapter_base.json"])["revision"] == online["heads"][BASE]
    assert "base_model: your-lab/act-base" in files["README.md"].decode()
    assert said["pipeline"] == said["tuned"] != said["base"]

    # The base goes on; the adapter stays with the commit it was trained on, also without a network.
    assert hub.head(BASE) != online["heads"][BASE]
    assert later["adapter"] == said["tuned"]
    assert offline["adapter"] == said["tuned"]


def put_run(hub, golden):
    hub.put_folder("models/someone/run", golden)
    for path in golden.iterdir():
        hub.put("models/someone/run", f"checkpoints/last/{path.name}", path.read_bytes())
    for name in ("optimizer.pt", "optimizer.safetensors", "ema.safetensors", "videos/a.mp4", "training_args.bin"):
        hub.put("models/someone/run", name, b"never fetched")


FILES = """
import os
from pathlib import Path
def held():
    snapshots = Path(os.environ["HF_HOME"]).glob("hub/models--someone--run/snapshots/*")
    return sorted(p.relative_to(root).as_posix() for root in snapshots for p in root.rglob("*") if p.is_file())
root = PolicyPipeline.from_pretrained("someone/run", device="cpu")
first = held()
inner = PolicyPipeline.from_pretrained("someone/run", subfolder="checkpoints/last", device="cpu")
commits = [root.policy.loaded_from.commit, inner.policy.loaded_from.commit]
report([first, held(), commits, inner.policy.config._commit_hash])
"""


def test_only_the_files_of_one_checkpoint_are_downloaded(hub, online, shared):
    """Neither checkpoints inside it nor states of an optimizer; of a subfolder, that subfolder alone."""
    said, golden = online["files"], shared / "golden" / "act_envstate" / "checkpoint"
    top = {path.name for path in golden.iterdir()}
    assert set(said[0]) <= top
    assert {"config.json", "model.safetensors", "policy_preprocessor.json"} <= set(said[0])
    assert set(said[1]) == set(said[0]) | {f"checkpoints/last/{name}" for name in said[0]}
    assert said[2] == [hub.head("models/someone/run")] * 2
    assert said[3] == said[2][0]


PROCESSORS = """
import transformers
from manipulators.training.tuning import apply_tuning
policy.push_to_hub("your-lab/other-base", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/other-base")
apply_tuning(tuned, {"tune_diffusion_model": "lora"}, r=2)
mine = PolicyProcessor.from_config(config, statistics | {"action": {"mean": [7.0, 7.0], "std": [1.0, 1.0]}})
tuned.push_to_hub("your-lab/other-adapter", processor=mine)
pipeline = transformers.pipeline("robotics", "your-lab/other-adapter", device="cpu")
loaded = AutoModel.from_pretrained("your-lab/other-adapter")
report([pipeline.processor.statistics["action"]["mean"], type(loaded).__name__])
"""


def test_transformers_pipeline_of_an_adapter_takes_the_adapters_processor(online):
    """The one of its base has other statistics."""
    assert online["processors"] == [[7.0, 7.0], "ACTPolicy"]


REPLACING = """
from manipulators.training.tuning import apply_tuning
policy.push_to_hub("your-lab/whole", processor=processor)
policy.push_to_hub("your-lab/tuned", processor=processor, max_shard_size=10_000)
policy.push_to_hub("your-lab/again", processor=processor, max_shard_size=10_000)
policy.push_to_hub("your-lab/again", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/whole")
apply_tuning(tuned, {"tune_diffusion_model": "lora"}, r=2)
tuned.push_to_hub("your-lab/tuned", processor=processor)
tuned.push_to_hub("your-lab/whole", processor=processor)
policy.push_to_hub("your-lab/whole", processor=processor)
report("done")
"""


def test_pushing_replaces_the_weights_that_were_there(hub, online):
    def weights(name):
        return {file for file in hub.repositories[f"models/your-lab/{name}"] if file.startswith(("model", "adapter"))}

    assert online["replacing"] == "done"
    assert weights("tuned") == {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json"}
    assert weights("again") == weights("whole") == {"model.safetensors"}
