"""Recipes: YAML and command-line text become values of the types that fields have; everything else is refused."""

import subprocess
import sys

import pytest

from manipulators import PolicyTrainingArguments
from manipulators.errors import InvalidRecipeError, ManipulatorsError, UnknownPolicyError
from manipulators.modeling import registry
from manipulators.training.runs.recipe import Recording, available_recipes, load_recipe

BASIC = "policy: act_policy\ndata: {dataset: some/where}\noutput: out\n"


@pytest.fixture
def load(tmp_path):
    """Load a recipe from its text, with overrides as keywords of `section.field`."""

    def load(text="", overrides=(), start=BASIC):
        path = tmp_path / "mine.yaml"
        path.write_text(start + text, encoding="utf-8")
        return load_recipe(path, list(overrides))

    return load


# --- what is shipped --------------------------------------------------------------------------------------


def test_recipes_are_listed():
    assert "act_metaworld" in available_recipes()


@pytest.mark.parametrize("name", available_recipes())
def test_every_shipped_recipe_loads(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / f"{name}.yaml").write_text(str(recipe))
    assert load_recipe(tmp_path / f"{name}.yaml") == recipe
    config = registry.policy_class(recipe.policy).config_class(**recipe.config)
    assert config.action_horizon >= config.n_action_steps >= 1
    arguments = PolicyTrainingArguments(str(tmp_path), **{**recipe.training, "bf16": False})  # whatever runs this
    assert arguments.max_steps > 0
    if recipe.base is not None:  # for demonstrations of the reader's own
        assert recipe.data.record is None and recipe.evaluation is None
        return
    assert len({entry.dataset for entry in recipe.data.entries}) == len(recipe.data.entries)
    assert recipe.evaluation.horizon is None or recipe.evaluation.horizon > 0
    for record in [entry.record for entry in recipe.data.entries]:
        demonstrated = range(record.seed, record.seed + 2 * record.episodes + 1)
        assert not set(demonstrated) & set(recipe.evaluation.seeds)


def test_the_metaworld_recipe_says_what_it_means():
    recipe = load_recipe("act_metaworld")
    assert recipe.data.dataset == "outputs/datasets/metaworld_pick-place-v3_50"
    assert recipe.data.record == Recording(environment="metaworld/pick-place-v3", episodes=50, seed=0)
    assert recipe.inputs == ["observation.state", "observation.environment_state"]
    assert recipe.config["chunk_size"] == 16
    assert recipe.config["use_vae"] is False
    assert recipe.training["learning_rate"] == 1e-3  # YAML itself reads `1e-3` as text
    assert type(recipe.training["learning_rate"]) is float
    assert recipe.evaluation.seeds == range(10_000, 10_050)


def test_a_recipe_loads_in_a_fresh_interpreter():
    code = "from manipulators.training.runs.recipe import load_recipe; print(load_recipe('act_metaworld').policy)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "act_policy\n", done.stderr


# --- types ------------------------------------------------------------------------------------------------

# section, field, text in YAML and on the command line, value
TYPED = [
    ("training", "learning_rate", "1e-4", 1e-4),
    ("training", "learning_rate", "3", 3.0),
    ("training", "learning_rate_visual", "1e-5", 1e-5),
    ("training", "learning_rate_visual", "null", None),
    ("training", "max_steps", "20000", 20000),
    ("training", "max_steps", "-1", -1),
    ("training", "bf16", "true", True),
    ("training", "bf16", "False", False),
    ("training", "optim", "sgd", "sgd"),
    ("training", "lr_scheduler_type", "cosine", "cosine"),
    ("config", "dropout", "0", 0.0),
    ("config", "chunk_size", "50", 50),
    ("config", "use_vae", "false", False),
    ("config", "temporal_ensemble_coeff", "1e-2", 0.01),
    ("config", "n_action_steps", "null", None),
    ("config", "pretrained_backbone_weights", "null", None),
    ("config", "pretrained_backbone_weights", "org/weights", "org/weights"),
    ("config", "feedforward_activation", "gelu", "gelu"),
    ("data", "episodes", "[0, 2, 5]", [0, 2, 5]),
    ("data", "episodes", "[7]", [7]),
    ("data", "episodes", "null", None),
]


def value_of(recipe, section, field):
    section = getattr(recipe, section)
    return section[field] if isinstance(section, dict) else getattr(section, field)


def assert_typed(value, expected):
    assert value == expected
    assert isinstance(value, type(expected))


@pytest.mark.parametrize(("section", "field", "text", "expected"), TYPED)
def test_values_from_the_command_line_have_their_fields_type(load, section, field, text, expected):
    assert_typed(value_of(load(overrides=[(f"{section}.{field}", text)]), section, field), expected)


@pytest.mark.parametrize(("section", "field", "text", "expected"), TYPED)
def test_values_from_yaml_have_their_fields_type(load, section, field, text, expected):
    if section == "data":
        recipe = load(start=f"policy: act_policy\noutput: out\ndata: {{dataset: some/where, {field}: {text}}}\n")
    else:
        recipe = load(f"{section}:\n  {field}: {text}\n")
    assert_typed(value_of(recipe, section, field), expected)


def test_quoted_numbers_are_numbers_where_numbers_belong(load):
    assert load("config: {dim_model: '64'}\n").config == {"dim_model": 64}


def test_inputs_from_the_command_line(load):
    assert load(overrides=[("inputs", "[observation.state]")]).inputs == ["observation.state"]
    assert load(overrides=[("inputs", "[observation.state, observation.images.top]")]).inputs == [
        "observation.state",
        "observation.images.top",
    ]
    assert load("inputs: [observation.state]\n", overrides=[("inputs", "null")]).inputs is None


def test_mappings_inside_the_config(load):
    recipe = load(overrides=[("config.normalization_mapping.STATE", "MIN_MAX")])
    assert recipe.config["normalization_mapping"] == {"STATE": "MIN_MAX"}
    recipe = load("config:\n  vision_config: {depths: [1, 1], layer_type: basic}\n")
    assert recipe.config["vision_config"] == {"depths": [1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("config.vision_config.depths", "[1, 1]", {"depths": [1, 1]}),
        ("config.vision_config", "{depths: [1, 1]}", {"depths": [1, 1]}),
    ],
)
def test_mappings_from_the_command_line(load, key, text, expected):
    assert load(overrides=[(key, text)]).config["vision_config"] == expected


@pytest.mark.parametrize(
    ("key", "text"),
    [("training.lr_scheduler_kwargs", '{"num_cycles": 2}'), ("training.lr_scheduler_kwargs.num_cycles", "2")],
)
def test_scheduler_arguments_from_the_command_line(load, key, text):
    assert load(overrides=[(key, text)]).training["lr_scheduler_kwargs"] == {"num_cycles": 2}


# --- overrides --------------------------------------------------------------------------------------------


def test_the_last_override_wins(load):
    recipe = load("training: {max_steps: 3}\n", [("training.max_steps", "4"), ("training.max_steps", "5")])
    assert recipe.training == {"max_steps": 5}


def test_overrides_leave_the_rest_alone():
    plain, changed = load_recipe("act_metaworld"), load_recipe("act_metaworld", [("config.dim_model", "64")])
    assert changed.config == plain.config | {"dim_model": 64}
    assert (changed.data, changed.training, changed.evaluation) == (plain.data, plain.training, plain.evaluation)


def test_another_dataset_is_not_recorded():
    recipe = load_recipe("act_metaworld", [("data.dataset", "your-name/your-dataset")])
    assert recipe.data.dataset == "your-name/your-dataset"
    assert recipe.data.record is None


def test_another_dataset_is_recorded_when_asked_for():
    overrides = [("data.dataset", "elsewhere"), ("data.record.episodes", "3")]
    recipe = load_recipe("act_metaworld", overrides)
    assert recipe.data.dataset == "elsewhere"
    assert recipe.data.record == Recording(environment="metaworld/pick-place-v3", episodes=3, seed=0)


def test_a_section_can_be_left_out():
    assert load_recipe("act_metaworld", [("evaluation", "null")]).evaluation is None


def test_a_section_can_be_added(load):
    recipe = load(overrides=[("evaluation.environment", "metaworld/reach-v3"), ("evaluation.episodes", "2")])
    assert recipe.evaluation.environment == "metaworld/reach-v3"
    assert recipe.evaluation.seeds == range(10_000, 10_002)


def test_the_name_is_the_files(load):
    assert load().name == "mine"


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainig: {max_steps: 1}\n", r"has no field 'trainig'\. Did you mean 'training'\?"),
        ("training: {max_step: 1}\n", r"training has no field 'max_step'\. Did you mean 'max_steps'"),
        ("training: {output_dir: x}\n", r"training has no field 'output_dir'"),
        ("config: {chunk_sise: 1}\n", r"config has no field 'chunk_sise'\. Did you mean 'chunk_size'\?"),
        (
            "evaluation: {environment: a/b, episode: 1}\n",
            r"evaluation has no field 'episode'\. Did you mean 'episodes'",
        ),
        ("evaluation: {episodes: 1}\n", r"evaluation lacks environment\."),
        ("evaluation: often\n", r"evaluation should hold `name: value` lines; it holds 'often'\."),
        ("training: {learning_rate: fast}\n", r"learning_rate: 'fast' cannot be read as float\."),
        ("training: {max_steps: many}\n", r"max_steps: 'many' cannot be read as int\."),
        ("training: {bf16: 'yes'}\n", r"bf16: 'yes' cannot be read as bool\."),
        ("training: {lr_scheduler_type: cosin}\n", r"'cosin' does not exist\. .*COSINE"),
        ("config: {feedforward_activation: rely}\n", r"feedforward_activation: 'rely' cannot be read as"),
        ("config: {normalization_mapping: {STATE: MINMAX}}\n", r"'MINMAX' does not exist\. Did you mean 'MIN_MAX'\?"),
        ("a: b: c\n", r"is not valid YAML"),
    ],
)
def test_refusals_name_the_field_and_what_exists(load, text, message):
    with pytest.raises(InvalidRecipeError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("", r"should hold `name: value` lines; it holds NoneType\."),
        ("- policy\n", r"should hold `name: value` lines; it holds list\."),
        ("policy: act_policy\noutput: out\n", r"lacks data\."),
        ("data: {dataset: x}\n", r"lacks policy, output\."),
        ("policy: act_policy\noutput: out\ndata: x\n", r"data should hold `name: value` lines; it holds 'x'\."),
        ("policy: act_policy\noutput: out\ndata: {}\n", r"data: it lacks dataset, or several datasets as mixture\."),
        (
            "policy: act_policy\noutput: out\ndata: {dataset: x, record: {env: a/b}}\n",
            r"data: record has no field 'env'\. ",
        ),
    ],
)
def test_refuses_an_incomplete_recipe(load, start, message):
    with pytest.raises(InvalidRecipeError, match=message):
        load(start=start)


@pytest.mark.parametrize(
    "text",
    [
        "training: {max_steps: 1.5}",
        "training: {max_steps: true}",
        "training: {learning_rate: [1]}",
        "training: {logging_first_step: 5}",
        "training: [max_steps]",
        "training: 5",
        "config: {chunk_size: yes}",
        "config: {chunk_size: 1.5}",
        "config: 5",
        "inputs: 5",
        "inputs: [1]",
        "evaluation: {environment: a/b, episodes: 2.5}",
        "evaluation: {environment: a/b, episodes: [2]}",
        "evaluation: {environment: 7}",
        "policy: 5",
        "policy: [act_policy]",
        "output: 5",
        "output: null",
        "data: null",
        "data: {dataset: 5}",
        "data: {dataset: null}",
        "data: {dataset: x, episodes: [first]}",
        "data: {dataset: x, episodes: [0.5]}",
        "5: 5",
    ],
)
def test_a_value_of_another_type_is_refused(load, text):
    with pytest.raises((InvalidRecipeError, UnknownPolicyError)):
        load(text)


@pytest.mark.parametrize("section", ["training", "config"])
def test_a_section_without_lines_is_empty_or_refused(load, section):
    """`training:` with every line below it commented out."""
    try:
        recipe = load(f"{section}:")
    except InvalidRecipeError as error:
        assert section in str(error)
    else:
        assert getattr(recipe, section) == {}


def test_unquoted_no_is_the_word_no_or_refused(load, tmp_path):
    """YAML reads `no` as false, where the field's word is `no`."""
    try:
        recipe = load("training: {save_strategy: no}")
    except InvalidRecipeError as error:
        assert "save_strategy" in str(error)
    else:
        assert PolicyTrainingArguments(str(tmp_path), **recipe.training).save_strategy == "no"


@pytest.mark.parametrize("key", ["policy.name", "output.folder", "policy.a.b"])
def test_a_single_value_has_no_fields(load, key):
    with pytest.raises(InvalidRecipeError, match="is a single value, it has no fields"):
        load(overrides=[(key, "x")])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("evaluation", "{"),
        ("evaluation", "5"),
        ("training", "5"),
        ("config", "x"),
        ("training.max_steps", "1.5"),
        ("training.max_steps", "true"),
        ("training.max_steps", ""),
        ("training.seed", "null"),
        ("config.chunk_size", "1e1"),
    ],
)
def test_an_override_of_another_type_is_refused(load, key, text):
    with pytest.raises(InvalidRecipeError):
        load(overrides=[(key, text)])


def test_names_the_nearest_recipe():
    with pytest.raises(InvalidRecipeError, match=r"no recipe 'act_metawrld'\. Did you mean 'act_metaworld'"):
        load_recipe("act_metawrld")


@pytest.mark.parametrize("source", ["/nowhere.yaml", "/tmp", ""])
def test_lists_the_recipes_for_a_path_that_does_not_exist(source):
    with pytest.raises(InvalidRecipeError, match=r"Available: act_metaworld"):
        load_recipe(source)


def test_names_the_nearest_policy(load):
    with pytest.raises(UnknownPolicyError, match=r"'act_polcy'\. Did you mean 'act_policy'"):
        load(overrides=[("policy", "act_polcy")])


def test_refuses_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManipulatorsError):
        load_recipe(path)
