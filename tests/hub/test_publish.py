"""Every door publishes the same: one commit, our card, the records, and nothing left that contradicts them."""

import json
import re

import pytest
import yaml

from manipulators.hub_cards.edits import was_edited
from manipulators.hub_cards.lint import lint_card

BUILD = """
import torch
from manipulators import ACTConfig, ACTPolicy, AutoPolicy, PolicyPipeline, PolicyProcessor
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
"""
EVALUATION = {
    "environment": "metaworld/reach-v3",
    "episodes": 4,
    "successes": 3,
    "success_rate": 0.75,
    "interval": [0.3006, 0.9544],
    "mean_return": 10.5,
    "mean_length": 61.0,
    "milliseconds_per_action": 2.5,
    "num_envs": 2,
    "seeds": [500, 501, 502, 503],
    "per_episode": [],
    "clipped_fraction": 0.0,
    "horizon": 200,
    "versions": {},
    "checkpoint": "/home/alice/runs/reach",
}
SAVED = (
    BUILD
    + f"""
import json, shutil
from pathlib import Path
from manipulators.cli import main
PolicyPipeline(model=policy, processor=processor, device="cpu").save_pretrained("saved")
Path("saved/evaluation.json").write_text(json.dumps({EVALUATION!r}))
Path("saved/checkpoint-2").mkdir()
Path("saved/checkpoint-2/optimizer.pt").write_bytes(b"private")
Path("saved/training_args.bin").write_bytes(b"private")
loaded = AutoPolicy.from_pretrained("saved")
"""
)


@pytest.fixture
def hub(new_hub):
    """A Hub of its own for every test: all publish under the same names."""
    return new_hub


@pytest.fixture
def client(new_client):
    return new_client


def files_of(hub, name):
    return hub.repositories[f"models/your-lab/{name}"]


def card_of(hub, name):
    return files_of(hub, name)["README.md"].decode()


def unnamed(card, name):
    """The card without the repository's name and the hash, which depends on it."""
    return re.sub(r"sha256=\w+", "", card.replace(f"your-lab/{name}", "").replace(f"name: {name}\n", ""))


def metadata_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_every_door_publishes_the_same(hub, client):
    hub.put("models/your-lab/command", "adapter_config.json", b"{}")
    hub.put("models/your-lab/command", "pytorch_model.bin", b"pickle")
    hub.put("models/your-lab/command", "notes.txt", b"a person's")
    client(
        SAVED
        + """
assert main(["push", "saved", "your-lab/command", "--private", "--tag", "my-arm"]) == 0
loaded.push_to_hub("your-lab/policy", tags=["my-arm"])
both = PolicyPipeline.from_pretrained("saved", device="cpu")
both.push_to_hub("your-lab/pipeline", tags="my-arm", private=True)
both.save_pretrained("again", push_to_hub=True, repo_id="your-lab/saving", tags=["my-arm"])
loaded.save_pretrained("mine", push_to_hub=True, repo_id="your-lab/alone", tags=["my-arm"])
shutil.copytree("saved", "other")
both.processor.save_pretrained("other", push_to_hub=True, repo_id="your-lab/processor", tags=["my-arm"])
report(None)
"""
    )
    expected = {"config.json", "model.safetensors", "processor_config.json", "evaluation.json", "README.md"}
    expected |= {".eval_results/manipulators.yaml"}
    for name in ("command", "policy", "pipeline", "saving", "alone", "processor"):
        assert set(files_of(hub, name)) - {"notes.txt"} == expected, name
        assert hub.commits[f"models/your-lab/{name}"] == (4 if name == "command" else 1), name
        card = card_of(hub, name)
        assert unnamed(card, name) == unnamed(card_of(hub, "command"), "command")
        assert not was_edited(card)
        assert f'PolicyPipeline.from_pretrained("your-lab/{name}")' in card
        assert "Solves 3 of 4 episodes" in card and "path/to/this/folder" not in card
        assert lint_card(card) == []
        assert metadata_of(card)["tags"] == ["robotics", "act_policy", "imitation-learning", "my-arm"]
        [entry] = yaml.safe_load(files_of(hub, name)[".eval_results/manipulators.yaml"])
        assert entry["dataset"] == {"id": "metaworld/reach-v3", "task_id": "reach-v3"}
        assert entry["value"] == 75.0
        assert json.loads(files_of(hub, name)["evaluation.json"])["checkpoint"] == "reach"
    assert files_of(hub, "command")["notes.txt"] == b"a person's"
    assert hub.private == {"models/your-lab/pipeline"}


def test_records_of_other_weights_are_left_out(hub, client):
    client(
        SAVED
        + """
with torch.no_grad():
    next(loaded.parameters()).add_(1.0)
loaded.push_to_hub("your-lab/tuned")
again = AutoPolicy.from_pretrained("saved", n_action_steps=1)
again.push_to_hub("your-lab/other-use")
processor.push_to_hub("your-lab/other-use", tags="my-arm")
report(None)
"""
    )
    for name in ("tuned", "other-use"):
        assert "evaluation.json" not in files_of(hub, name)
        assert "has not been evaluated" in card_of(hub, name)
        assert not was_edited(card_of(hub, name))
    assert "my-arm" in metadata_of(card_of(hub, "other-use"))["tags"]


def test_cards_branches_and_refusals(hub, client):
    edited = b"---\nlibrary_name: manipulators\nlicense: mit\n---\n\nMeasured on my own arm.\n"
    hub.put("models/your-lab/edited", "README.md", edited)
    said = client(
        SAVED
        + """
from manipulators.errors import ManipulatorsError
assert main(["push", "saved", "your-lab/edited"]) == 0
assert main(["push", "saved", "your-lab/branches"]) == 0
assert main(["push", "saved", "your-lab/branches", "--revision", "v2", "--message", "Second"]) == 0
card = Path("saved/README.md")
card.write_text("---\\nlicense: mit\\n---\\nMine.\\n")
assert main(["push", "saved", "your-lab/mine"]) == 0
problems = [main(["push", ".", "your-lab/nothing"]), main(["push", "saved", "not a name"])]
report(problems)
"""
    )
    assert said == [1, 1]
    assert hub.repositories["models/your-lab/edited"]["README.md"] == edited
    assert "model.safetensors" in hub.repositories["models/your-lab/branches@v2"]
    assert hub.commits["models/your-lab/branches"] == 1
    assert "Mine." in card_of(hub, "mine")
    assert "models/your-lab/nothing" not in hub.repositories


def test_a_dataset(hub, client, shared, tmp_path):
    folder = shared / "data" / "lerobot_v3_tiny"
    hub.put("datasets/your-lab/tiny", "data/chunk-000/file-007.parquet", b"old")
    said = client(
        f"""
from manipulators import LeRobotDataset
from manipulators.cli import main
assert main(["push", {str(folder)!r}, "your-lab/tiny"]) == 0
assert main(["dataset", "push", {str(folder)!r}, "your-lab/tiny"]) == 0
assert main(["dataset", "push", "/nowhere", "your-lab/tiny"]) == 1
assert main(["dataset", "retask", "your-lab/tiny", "--task", "lift"]) == 1
assert main(["dataset", "select", "your-lab/tiny", "--episodes", "0", "--output", {str(tmp_path / "first")!r}]) == 0
assert main(["dataset", "push", {str(tmp_path / "first")!r}, "your-lab/first"]) == 0
report([len(LeRobotDataset("your-lab/tiny")), LeRobotDataset("your-lab/first").num_episodes])
"""
    )
    assert said[0] > 0 and said[1] == 1
    files = hub.repositories["datasets/your-lab/tiny"]
    assert set(files) == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} | {"README.md"}
    assert metadata_of(files["README.md"].decode())["tags"] == ["LeRobot"]
    version = json.loads(files["meta/info.json"])["codebase_version"]
    assert hub.tags["datasets/your-lab/tiny"] == {version: hub.head("datasets/your-lab/tiny")}
    # One that was made of another names it, with its commit.
    card = hub.repositories["datasets/your-lab/first"]["README.md"].decode()
    assert f"| your-lab/tiny | {hub.head('datasets/your-lab/tiny')} | 0 |" in card


TRAIN = (
    BUILD
    + """
from pathlib import Path
from torch.utils.data import Dataset
from manipulators import PolicyTrainer, PolicyTrainingArguments
class Samples(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        state = torch.full((3,), float(index))
        labels = {"action": torch.zeros(4, 2), "action_is_pad": torch.zeros(4).bool()}
        return {"observation.state": state, "task": "", **labels}
def trainer(**options):
    arguments = PolicyTrainingArguments(
        "run", max_steps=4, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, push_to_hub=True, **options
    )
    return PolicyTrainer(policy, arguments, processor, train_dataset=Samples())
"""
)


def test_a_trainer_publishes_every_checkpoint_and_the_end(hub, client):
    client(
        TRAIN
        + """
run = trainer(
    hub_model_id="your-lab/run", hub_strategy="checkpoint", save_strategy="steps", save_steps=2, hub_always_push=True,
    save_total_limit=1, hub_private_repo=True,
)
run.train()
run.create_model_card()
run.push_to_hub(tags="my-arm")
report(None)
"""
    )
    files = files_of(hub, "run")
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} < set(files)
    assert "last-checkpoint/optimizer.pt" in files and "training_args.bin" not in files
    assert hub.commits["models/your-lab/run"] == 3
    assert hub.private == {"models/your-lab/run"}
    card = card_of(hub, "run")
    assert not was_edited(card) and lint_card(card) == []
    assert "my-arm" in metadata_of(card)["tags"]


RECIPE = """
policy: act_policy
inputs: [observation.state]
data: {{dataset: {dataset}}}
config: {{chunk_size: 4, dim_model: 16, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1, use_vae: false}}
training: {{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true}}
output: trained
"""


def test_a_hub_that_is_away_ends_no_training_and_is_one_of_our_errors(hub, client):
    said = client(
        TRAIN
        + """
import huggingface_hub.constants
from huggingface_hub import HfApi
from manipulators.errors import PublishingError
run = trainer(hub_model_id="your-lab/run", save_strategy="steps", save_steps=2, hub_always_push=True)
HfApi.upload_folder = lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("The cable is out."))
run.train()
try:
    run.push_to_hub()
except PublishingError as error:
    problem = str(error)
report([problem, sorted(path.name for path in Path("run").iterdir()), run.state.global_step])
"""
    )
    assert "your-lab/run could not be published: The cable is out." in said[0]
    assert {"checkpoint-2", "checkpoint-4", "config.json"} < set(said[1])
    assert not any(name.startswith(".publishing") for name in said[1])
    assert said[2] == 4
    assert "models/your-lab/run" not in hub.commits


def test_a_training_run_publishes_what_it_has_made(hub, client, shared):
    recipe = RECIPE.format(dataset=shared / "data" / "lerobot_v3_tiny")
    client(
        f"""
from pathlib import Path
from manipulators.cli import main
Path("tiny.yaml").write_text({recipe!r})
arguments = ["--training.push_to_hub", "true", "--training.hub_model_id", "your-lab/trained"]
assert main(["train", "tiny.yaml", *arguments]) == 0
report(None)
"""
    )
    expected = {"config.json", "model.safetensors", "processor_config.json", "training.json", "README.md"}
    assert set(files_of(hub, "trained")) == expected | {"learning_curve.png"}
    assert hub.commits["models/your-lab/trained"] == 1
    assert 'PolicyPipeline.from_pretrained("your-lab/trained")' in card_of(hub, "trained")


def test_licences_and_adapters(hub, client, shared):
    """A base's licence holds for what is made from it; a policy from scratch has this library's."""
    hub.put("models/your-lab/base", "README.md", b"---\nlicense: cc-by-nc-4.0\n---\nA base.\n")
    golden = shared / "golden" / "pi0_lerobot_ckpt"
    said = client(
        SAVED
        + f"""
from manipulators import PolicyPipeline
from manipulators.training.tuning import apply_tuning, merge_and_save
import logging
from transformers.utils import logging as their_logging
warnings = []
class Listener(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
their_logging.get_logger("manipulators").addHandler(Listener())
logging.getLogger("manipulators").addHandler(Listener())
assert main(["push", "saved", "your-lab/scratch"]) == 0
policy.push_to_hub("your-lab/base", processor=processor)
tuned = AutoPolicy.from_pretrained("your-lab/base")
apply_tuning(tuned, {{"tune_diffusion_model": "lora"}}, r=2)
tuned.push_to_hub("your-lab/adapter", processor=processor)
local = AutoPolicy.from_pretrained("saved")
apply_tuning(local, {{"tune_diffusion_model": "lora"}}, r=2)
local.save_pretrained("local-adapter")
processor.save_pretrained("local-adapter")
before = len(warnings)
assert main(["push", "local-adapter", "your-lab/local-adapter"]) == 0
merge_and_save(tuned, "merged", processor)
assert main(["push", "merged", "your-lab/merged"]) == 0
gemma = {{"num_hidden_layers": 3, "head_dim": 16, "vocab_size": 320}}
vision = {{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}}
sizes = {{
    "paligemma_config": {{
        "projection_dim": 64,
        "text_config": gemma | {{"hidden_size": 64, "intermediate_size": 96}},
        "vision_config": vision,
    }},
    "gemma_expert_config": gemma | {{"hidden_size": 32, "intermediate_size": 64}},
}}
pi0 = PolicyPipeline.from_pretrained({str(golden / "checkpoint")!r}, tokenizer={str(golden / "tokenizer")!r}, **sizes)
pi0.push_to_hub("your-lab/pi0")
pi0.save_pretrained("pi0")
report([w for w in warnings[before:] if "adapter" in w])
"""
    )
    assert any("manipulators.merge_and_save(policy, folder)" in warning for warning in said)
    licenses = {
        name: metadata_of(card_of(hub, name)).get("license") for name in ("scratch", "adapter", "merged", "pi0")
    }
    assert licenses == {"scratch": "apache-2.0", "adapter": "cc-by-nc-4.0", "merged": "cc-by-nc-4.0", "pi0": "gemma"}
    assert "Gemma Terms of Use" in card_of(hub, "pi0") and lint_card(card_of(hub, "pi0")) == []
    assert "ACT adapter with" in card_of(hub, "adapter")
