"""The command line: what each command does, and that every error is one message and exit status 1."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import ACTConfig, AutoPolicy, PolicyPipeline, __version__
from manipulators.auto import load_policy_and_processor
from manipulators.cli import build_parser, main
from manipulators.evaluation.simulators.metaworld.environment import MetaWorldEnvironment

ENVIRONMENT = "metaworld/pick-place-v3"
RECIPE = """
policy: act_policy
data:
  dataset: {dataset}
  record: {{environment: metaworld/pick-place-v3, episodes: 1, seed: 0}}
config: {{chunk_size: 4, dim_model: 16, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1, use_vae: false}}
training: {{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true}}
evaluation: {{environment: metaworld/pick-place-v3, episodes: 1, horizon: 4}}
output: {output}
"""


@pytest.fixture(autouse=True, scope="module")
def _offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Demonstrations, recorded by the command."""
    output = tmp_path_factory.mktemp("cli") / "demonstrations"
    assert main(["record", "--env", ENVIRONMENT, "--episodes", "1", "--seed", "0", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def trained(recorded):
    """A checkpoint, trained by the command."""
    recipe, output = recorded.parent / "tiny.yaml", recorded.parent / "trained"
    recipe.write_text(RECIPE.format(dataset=recorded, output="nowhere"), encoding="utf-8")
    assert (
        main(["train", str(recipe), "--training.max_steps", "2", "--config.dim_model=8", "--output", str(output)]) == 0
    )
    return output


@pytest.fixture
def fails(capsys):
    """Run a command that has to fail, and return its message."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run


# --- the parser -------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = (
        "import sys, time\n"
        "from manipulators.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'datasets', 'gymnasium'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), time.process_time() < 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "HEAVY [] True" in done.stdout
    for command in ("record", "train", "eval", "benchmark", "convert", "card", "push"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("start", [["-m", "manipulators"], None])
def test_it_can_be_started(start):
    program = [sys.executable, *start] if start else [str(Path(sys.executable).with_name("manipulators"))]
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["record"], ["eval", "somewhere"], ["convert", "a"], ["eval", "a", "--env", "b", "--episode"]],
)
def test_wrong_use_is_told_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: manipulators" in capsys.readouterr().err


def test_only_train_takes_overrides(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["card", "somewhere", "--training.max_steps", "5"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --training.max_steps 5" in capsys.readouterr().err


def test_defaults():
    options = build_parser().parse_args(["eval", "org/name", "--env", ENVIRONMENT])
    assert (options.episodes, options.seed, options.num_envs, options.horizon) == (50, 10_000, 10, None)
    options = build_parser().parse_args(["record", "--env", ENVIRONMENT, "--output", "there"])
    assert (options.episodes, options.seed, options.output) == (50, 0, Path("there"))


def test_an_error_is_one_message_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "manipulators", "train", "act_metawrld"], capture_output=True, text=True
    )
    assert done.returncode == 1
    message = [line for line in done.stderr.splitlines() if line.strip()]
    nearest = "Did you mean 'act_metaworld' or 'act_metaworld_pixels'?"
    assert message == [f"InvalidRecipeError: There is no recipe 'act_metawrld'. {nearest}"]


def test_an_interrupt_in_an_import_ends_the_command_at_once(tmp_path):
    (tmp_path / "slow_plugin.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    [None for _ in range(1000)]\n"
        "except KeyboardInterrupt:\n"
        "    raise ImportError('made of an interrupt')\n"
    )
    command = ["record", "--plugin", "slow_plugin", "--env", ENVIRONMENT, "--output", "demos"]
    done = subprocess.run(
        [sys.executable, "-m", "manipulators", *command], capture_output=True, text=True, cwd=tmp_path
    )
    expected = f"\nStopped. Nothing was finished. To begin again: manipulators {shlex.join(command)}\n"
    assert (done.returncode, done.stderr) == (130, expected)


# --- record -----------------------------------------------------------------------------------------------


def test_record(recorded):
    info = json.loads((recorded / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 1


def test_record_refuses_an_existing_folder(recorded, fails):
    message = fails("record", "--env", ENVIRONMENT, "--episodes", 1, "--output", recorded)
    assert "OutputExistsError" in message
    assert "demonstrations already exists" in message


def test_record_names_the_nearest_environment(tmp_path, fails):
    message = fails("record", "--env", "metaworld/pick-plase-v3", "--output", tmp_path / "new")
    assert "UnknownEnvironmentError" in message
    assert "'metaworld/pick-place-v3'" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("kept", "message"),
    [(0, "Stopped. Nothing was finished. To begin again: "), (2, "Stopped. 2 finished episodes are kept in {output}")],
)
def test_record_is_stopped_and_goes_on(tmp_path, capsys, monkeypatch, kept, message):
    output = tmp_path / "demos"
    arguments = ["record", "--env", ENVIRONMENT, "--episodes", "3", "--horizon", "150", "--output", str(output)]
    reset, seeds = MetaWorldEnvironment.reset, []

    def interrupted(self, *, seed=None, options=None):
        seeds.append(seed)
        if len(seeds) > kept:
            raise KeyboardInterrupt
        return reset(self, seed=seed, options=options)

    with monkeypatch.context() as patch:
        patch.setattr(MetaWorldEnvironment, "reset", interrupted)
        assert main(arguments) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Stopped")]
    assert len(lines) == 1 and lines[0].startswith(message.format(output=f"{output}.recording"))
    assert lines[0].endswith(f": manipulators {shlex.join(arguments)}")
    if kept:
        with monkeypatch.context() as patch:  # a second interrupt, before anything is said
            patch.setattr("manipulators.evaluation.demonstrations.record_demonstrations", interrupt)
            assert main(arguments) == 130
        assert f"Stopped. 2 finished episodes are kept beside {output}. To go on: " in capsys.readouterr().err
        assert main(arguments) == 0
        assert "2 of them had been recorded before" in capsys.readouterr().out
        assert json.loads((output / "meta" / "info.json").read_text())["total_episodes"] == 3


# --- train ------------------------------------------------------------------------------------------------


def test_train(trained, recorded):
    record = json.loads((trained / "training.json").read_text())
    assert record["training"]["steps"] == 2
    assert json.loads((trained / "config.json").read_text())["dim_model"] == 8
    assert record["training"]["command"] == (
        f"manipulators train {recorded.parent / 'tiny.yaml'} --training.max_steps 2 --config.dim_model=8 "
        f"--output {trained}"
    )
    assert json.loads((trained / "evaluation.json").read_text())["horizon"] == 4


def test_help_of_train_lists_every_field_of_the_recipe(capsys):
    shown = []
    for arguments in (["train", "act_metaworld", "--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    for line in (
        "  --data.record.episodes  int = 50\n      number of successful episodes of each environment.",
        "  --evaluation.horizon  int or null = null\n      steps after which an episode has failed;",
        "  --config.chunk_size  int = 16\n      actions predicted at once",
        "  --config.vision_norm  'frozen_batch' or 'group' = frozen_batch\n",
        "  --training.learning_rate  float = 0.001\n",
        "  --training.tune_llm  true or false or 'lora' or 'true' or 'false' or null = null\n",
        "  --training.weight_decay  float = 0.0001\n      ",
    ):
        assert line in shown[0]
    fields = set(re.findall(r"--config\.(\w+)", shown[0]))
    assert set(ACTConfig.field_names()) - fields == {"input_features", "output_features", "format_version"}
    assert "  --training.learning_rate  float = 5e-05\n" in shown[1]
    assert "manipulators train RECIPE --help" in shown[1]


def test_help_of_no_recipe_names_the_nearest(fails):
    assert "Did you mean 'act_metaworld'" in fails("train", "act_metawrld", "--help")


def test_train_prints_the_result(recorded, tmp_path, capsys):
    recipe = recorded.parent / "tiny.yaml"
    recipe.write_text(RECIPE.format(dataset=recorded, output=tmp_path / "out"), encoding="utf-8")
    assert main(["train", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert f"Policy, card and results: {tmp_path / 'out'}" in printed
    assert f"{ENVIRONMENT}: success 0% of 1 episodes (95 % interval 0.0% to 79.3%), mean length 4.0 steps" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.dim_modle", "8"], "config has no field 'dim_modle'. Did you mean 'dim_model'?"),
        (["--confg.dim_model", "8"], "has no field 'confg'. Did you mean 'config'?"),
        (["--training.max_steps", "many"], "max_steps: 'many' cannot be read as int."),
        (["--training.max_steps"], "--training.max_steps lacks its value"),
        (["config.dim_model=8"], "'config.dim_model=8' is not an override; write --section.field value"),
        (["--policy", "act_polcy"], "'act_polcy'. Did you mean 'act_policy'"),
        (["--config.n_heads", "3"], "dim_model=16 must be a multiple of n_heads=3"),
        (["--data.dataset", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--data.dataset", "some-org/no-such-dataset"], "some-org/no-such-dataset"),
        (["--inputs", "[observation.stat]"], "observation.stat"),
        (["--inputs", "[]"], "inputs"),
        (["--evaluation", "{"], "evaluation"),
        (["--resume"], "checkpoint"),
    ],
)
def test_train_refuses(recorded, tmp_path, fails, overrides, message):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(dataset=recorded, output=tmp_path / "out"), encoding="utf-8")
    assert message in fails("train", recipe, *overrides)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["--training.save_strategy", "sometimes"],
        ["--training.optim", "adamm"],
        ["--training.eval_strategy", "steps"],
    ],
)
def test_train_refuses_what_transformers_refuses(recorded, tmp_path, fails, overrides):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(dataset=recorded, output=tmp_path / "out"), encoding="utf-8")
    assert fails("train", recipe, *overrides)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_train_is_stopped_and_says_how_to_go_on(recorded, tmp_path, capsys, monkeypatch):
    recipe, output = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(dataset=recorded, output=output), encoding="utf-8")

    def stopped(patched, *options):
        with monkeypatch.context() as patch:
            patch.setattr(f"manipulators.training.runs.{patched}", interrupt)
            assert main(["train", str(recipe), *options]) == 130
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Stopped. ")]
        return line.removeprefix("Stopped. ")

    again, options = (
        f"manipulators train {recipe}",
        ["--training.save_strategy", "steps", "--training.save_steps", "1"],
    )
    assert stopped("run.build_policy") == f"Nothing was finished. To begin again: {again}"
    assert stopped("run.save_checkpoint", *options) == (
        f"{output}/checkpoint-1 is kept. To go on: {again} {' '.join(options)} --resume"
    )
    assert stopped("run.evaluate_checkpoint", "--resume", *options) == (
        f"The trained policy is in {output}. To go on: {again} --resume {' '.join(options)}"
    )
    shutil.rmtree(output)
    evaluation = f"--env {ENVIRONMENT} --episodes 1 --seed 10000 --num-envs 10 --output {output}/evaluation.json"
    assert stopped("run.evaluate_checkpoint", "--training.save_strategy", "no") == (
        f"The trained policy is in {output}. To evaluate it: manipulators eval {output} {evaluation} --horizon 4"
    )
    (output / "config.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("manipulators.training.runs.run.refuse_existing", lambda path: None)
        assert "No checkpoint was written; --training.save_strategy steps" in stopped("run.build_policy")


# --- eval -------------------------------------------------------------------------------------------------


def test_eval_is_stopped_and_goes_on(trained, tmp_path, capsys, monkeypatch):
    result = tmp_path / "result.json"
    arguments = ["eval", str(trained), "--env", ENVIRONMENT, "--episodes", "3", "--horizon", "3", "--num-envs", "1"]
    reset = MetaWorldEnvironment.reset

    def interrupted(self, *, seed=None, options=None):
        return reset(self, seed=seed, options=options) if seed != 10_002 else interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(MetaWorldEnvironment, "reset", interrupted)
        assert main(arguments) == 130
        assert "Stopped. No episode is kept without --output FILE. To begin again" in capsys.readouterr().err
        arguments += ["--output", str(result)]
        assert main(arguments) == 130
    message = (
        f"Stopped. 2 of 3 episodes are finished and kept in {tmp_path / 'result.partial.json'}: the same evaluation "
    )
    message += f"goes on after them. To go on: manipulators {shlex.join(arguments)}\n"
    assert message in capsys.readouterr().err
    with monkeypatch.context() as patch:  # a second interrupt, before anything is said
        patch.setattr("manipulators.evaluation.rollout.evaluate", interrupt)
        assert main(arguments) == 130
    assert f"Stopped. Finished episodes are kept in {tmp_path / 'result.partial.json'}." in capsys.readouterr().err
    assert main(arguments) == 0
    assert json.loads(result.read_text())["seeds"] == [10_000, 10_001, 10_002]


def test_eval(trained, tmp_path, capsys):
    result = tmp_path / "deep" / "result.json"
    arguments = ["eval", str(trained), "--env", ENVIRONMENT, "--episodes", "3", "--seed", "7", "--num-envs", "2"]
    assert main([*arguments, "--horizon", "5", "--device", "cpu", "--output", str(result)]) == 0
    assert f"{ENVIRONMENT}: success " in capsys.readouterr().out
    measured = json.loads(result.read_text())
    assert measured["seeds"] == [7, 8, 9]
    assert (measured["episodes"], measured["num_envs"], measured["horizon"]) == (3, 2, 5)


@pytest.mark.parametrize(
    "options",
    [
        ["--episodes", "3", "--seed", "7"],
        [
            "--seeds",
            "7",
            "12",
            "9",
            "--dtype",
            "float64",
            "--clamp-actions",
            "--max-action-step",
            "0.3",
            "0.2",
            "1",
            "1",
            "--observation-limit",
            "inf",
            "--config.n_action_steps",
            "1",
        ],
        ["--episodes", "2", "--config.temporal_ensemble_coeff=0.01", "--config.n_action_steps=1"],
    ],
)
def test_the_cards_command_repeats_the_evaluation(trained, tmp_path, options):
    folder, again = tmp_path / "policy", tmp_path / "again.json"
    shutil.copytree(trained, folder)
    first = ["eval", str(folder), "--env", ENVIRONMENT, "--num-envs", "2", "--horizon", "5", "--device", "cpu"]
    assert main([*first, *options, "--output", str(folder / "evaluation.json")]) == 0
    assert main(["card", str(folder), "--repo-id", "your-lab/act"]) == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    command = shlex.split(re.search(r"To repeat the evaluation:\n\n```bash\n(.+)\n```", card)[1])
    assert command[:3] == ["manipulators", "eval", "your-lab/act"]
    assert main(["eval", str(folder), *command[3:], "--output", str(again)]) == 0
    measured = [json.loads(path.read_text()) for path in (folder / "evaluation.json", again)]
    for result in measured:
        for changing in ("milliseconds_per_action", "date"):
            assert result.pop(changing)
    assert measured[0] == measured[1]
    assert measured[0]["checkpoint"] == str(folder)
    assert (measured[0]["device"], measured[0]["commit"], measured[0]["sampling_steps"]) == ("cpu", None, None)
    assert measured[0]["n_action_steps"] == (1 if "n_action_steps" in str(options) else 4)
    assert measured[0]["dtype"] == ("float64" if "float64" in options else "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--camera-map", "front"], "--camera-map 'front' is no pair; write your_camera=policy_camera"),
        (["--camera-map", "front=top"], "camera_map names the policy's camera 'top'"),
        (["--tokenizer", "somewhere"], "tokenizer"),
        (["--embodiment", "gr2"], "gr2"),
        (["--config.n_action_stepz", "1"], "n_action_steps"),
        (["--config.n_action_steps"], "lacks its value"),
        (["--config.n_action_steps", "{"], "is not valid YAML"),
        (["--config.n_action_steps", "1", "--training.max_steps", "2"], "--training.max_steps is no option here"),
    ],
)
def test_eval_refuses_options_that_do_not_fit(trained, fails, options, message):
    assert message in fails("eval", trained, "--env", ENVIRONMENT, "--episodes", 1, *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--env", ENVIRONMENT], "/nowhere is neither a folder nor a readable Hub repository"),
        (["some-org/no-such-policy", "--env", ENVIRONMENT], "some-org/no-such-policy"),
        (["{trained}", "--env", "metawrld/pick-place-v3"], "UnknownEnvironmentError"),
        (["{trained}", "--env", ENVIRONMENT, "--episodes", "0"], "at least one seed"),
        (["{trained}", "--env", ENVIRONMENT, "--num-envs", "0"], "num_envs = 0"),
        (["{trained}", "--env", ENVIRONMENT, "--horizon", "0"], "horizon = 0"),
        (["{trained}", "--env", ENVIRONMENT, "--device", "gpu9"], "gpu9"),
    ],
)
def test_eval_refuses(trained, fails, arguments, message):
    assert message in fails("eval", *[argument.format(trained=trained) for argument in arguments])


def test_eval_refuses_a_checkpoint_without_a_weight(trained, tmp_path, fails):
    shutil.copytree(trained, tmp_path / "half")
    weights = load_file(trained / "model.safetensors")
    del weights["action_head.action_head.bias"]
    save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    message = fails("eval", tmp_path / "half", "--env", ENVIRONMENT, "--episodes", 1)
    assert "WeightsMismatchError" in message
    assert "action_head.action_head.bias" in message


# --- convert ----------------------------------------------------------------------------------------------


def test_convert(shared, tmp_path, capsys):
    source, output = shared / "golden" / "act_envstate" / "checkpoint", tmp_path / "ours"
    assert main(["convert", str(source), str(output)]) == 0
    assert f"{source} written to {output}" in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "model.safetensors", "processor_config.json", "README.md"}
    assert json.loads((output / "config.json").read_text())["model_type"] == "act_policy"

    theirs = PolicyPipeline.from_pretrained(source, device="cpu")
    ours = PolicyPipeline.from_pretrained(output, device="cpu")
    observation = {
        name: torch.linspace(-1, 1, feature.shape[0]) for name, feature in ours.policy.config.input_features.items()
    }
    weights = theirs.policy.state_dict()
    assert ours.policy.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in ours.policy.state_dict().items())
    # Close, not equal: loaded weights begin where they do in their file, and some processors' sums depend on that.
    torch.testing.assert_close(ours.predict_chunk(observation), theirs.predict_chunk(observation))
    for name, value in AutoPolicy.from_pretrained(source).state_dict().items():
        assert torch.equal(ours.policy.state_dict()[name], value), name


def test_convert_is_stopped_and_leaves_nothing(shared, tmp_path, capsys, monkeypatch):
    arguments = ["convert", str(shared / "golden" / "act_envstate" / "checkpoint"), str(tmp_path / "ours")]
    monkeypatch.setattr("manipulators.hub_cards.checkpoint_card.write_checkpoint_card", interrupt)
    assert main(arguments) == 130
    assert f"\nStopped. Nothing was finished. To begin again: manipulators {shlex.join(arguments)}\n" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_convert_with_a_tokenizer(shared, tmp_path, monkeypatch):
    """LeRobot's π0 only names its tokenizer, which is gated; its tiny sizes are given as from Python."""
    golden = shared / "golden" / "pi0_lerobot_ckpt"
    gemma = {"num_hidden_layers": 3, "head_dim": 16, "vocab_size": 320}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {
        "paligemma_config": {
            "projection_dim": 64,
            "text_config": gemma | {"hidden_size": 64, "intermediate_size": 96},
            "vision_config": vision,
        },
        "gemma_expert_config": gemma | {"hidden_size": 32, "intermediate_size": 64},
    }
    monkeypatch.setattr("manipulators.auto.load_policy_and_processor", partial(load_policy_and_processor, **sizes))
    arguments = ["convert", str(golden / "checkpoint"), str(tmp_path / "ours")]
    assert main([*arguments, "--tokenizer", str(golden / "tokenizer")]) == 0
    processor = PolicyPipeline.from_pretrained(tmp_path / "ours", device="cpu").processor
    assert processor.encode_instruction("pick up", 1)["input_ids"].tolist() == [[2, 5, 6, 4, *[0] * 8]]


def test_convert_refuses_an_existing_folder(shared, tmp_path, fails):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    message = fails("convert", shared / "golden" / "act_envstate" / "checkpoint", tmp_path / "mine")
    assert "OutputExistsError" in message
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_convert_refuses_another_projects_other_policy(shared, tmp_path, fails):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"type": "vqbet"}')
    message = fails("convert", tmp_path / "source", tmp_path / "ours")
    assert "UnknownPolicyError" in message
    assert "'vqbet'" in message
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "ours.incomplete").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": 5}', '{"model_type": null}'])
def test_convert_refuses_a_broken_config(tmp_path, fails, content):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(content)
    assert "Error" in fails("convert", tmp_path / "source", tmp_path / "ours")


# --- card -------------------------------------------------------------------------------------------------


def test_card_passes_its_own_check_and_bears_its_name(trained, tmp_path, capsys):
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    for naming in ([], ["--repo-id", "your-lab/act-pick"]):
        assert main(["card", str(folder), *naming]) == 0
        assert capsys.readouterr().out.strip() == str(folder / "README.md")
        assert main(["card", str(folder), "--check"]) == 0
        assert f"is fit to publish: manipulators push {folder} org/name" in capsys.readouterr().out
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert 'PolicyPipeline.from_pretrained("your-lab/act-pick")' in text
    # Of the folders of this computer only the last part is left.
    assert "manipulators train tiny.yaml --training.max_steps 2 --config.dim_model=8 --output trained\n```" in text


def test_card_check_lists_every_problem(trained, tmp_path, fails):
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("## Limits", "## Limitations"), encoding="utf-8")
    message = fails("card", folder, "--check")
    assert "- The section “Limits” is missing." in message
    assert "- The placeholder “path/to/this/folder” is left." in message


def test_card_needs_a_checkpoint(tmp_path, fails):
    assert "has no README.md. Write it: manipulators card" in fails("card", tmp_path, "--check")
    assert "holds no config.json; it holds nothing." in fails("card", tmp_path)
    assert "MissingFileError" in fails("card", tmp_path / "nowhere")


# --- push -------------------------------------------------------------------------------------------------


def test_push_refuses_weights_that_are_no_numbers(trained, tmp_path, fails):
    folder = tmp_path / "diverged"
    shutil.copytree(trained, folder)
    weights = load_file(folder / "model.safetensors")
    weights["action_head.action_head.bias"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = fails("push", folder, "your-lab/act")
    assert "WeightsValueError" in message
    assert "action_head.action_head.bias" in message
