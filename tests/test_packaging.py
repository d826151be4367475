"""What an installed copy holds, what importing it costs, and which room may import which."""

import ast
import configparser
import functools
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoConfig, AutoModel, BertConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import manipulators
from manipulators.modeling import registry

ROOT = Path(manipulators.__file__).parent
NOT_SHIPPED = {"tests", "benchmarks"}
ROOMS = {
    "configuration",
    "modeling",
    "processing",
    "hub_cards",
    "data",
    "training",
    "inference",
    "evaluation",
    "conversion",
    "recipes",
}


@functools.cache
def shipped_modules():
    """Every Python file of the package: dotted name without `manipulators.` → path."""
    # Not one rglob over the root: virtual environments stand in it, with ten thousands of files.
    kept = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "build", "dist"))]
    paths = [
        *ROOT.glob("*.py"),
        *(path for room in kept if room.name not in NOT_SHIPPED for path in room.rglob("*.py")),
    ]
    modules = {}
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return modules


def run(code, cwd="/"):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- setup.cfg --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_is_listed(setup):
    found = {
        "manipulators." + name if name else "manipulators"
        for name, path in shipped_modules().items()
        if path.name == "__init__.py"
    }
    listed = setup["options"]["packages"].split()
    assert sorted(listed) == sorted(found)


def test_every_folder_with_python_files_is_a_package():
    folders = {path.parent for path in shipped_modules().values()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_rooms_are_those_of_the_design():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_SHIPPED
    assert found == ROOMS


def test_tests_are_no_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_bounds_of_torch_and_transformers(setup):
    requirements = setup["options"]["install_requires"].split()
    assert any(line.startswith("torch") and line.endswith("<2.14") for line in requirements)
    assert any(line.startswith("transformers>=5.20") and line.endswith("<5.24") for line in requirements)
    assert not any(line.startswith(("torchvision", "flash")) for line in requirements)


def test_the_oldest_versions_tested_are_the_oldest_allowed(setup):
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    requirements = [Requirement(line) for line in setup["options"]["install_requires"].split()]
    lowest = {r.name: s.version for r in requirements for s in r.specifier if s.operator == ">="}
    assert {"transformers", "huggingface_hub", "accelerate", "datasets", "diffusers", "peft"} <= tested.keys()
    assert {name: Version(version) for name, version in tested.items()} == {
        name: Version(lowest[name]) for name in tested
    }


def test_everything_imported_is_required(setup):
    """A third-party module that the library imports is among the requirements, or in the extra for simulators."""
    section = setup["options"]["install_requires"] + setup["options.extras_require"]["sim"]
    required = {line.split("=")[0].strip("<>~! ").lower() for line in section.split("\n")}
    required = {name.split("<")[0].split(">")[0] for name in required}
    distribution = {"PIL": "pillow", "yaml": "pyyaml"}
    missing = {}
    for name, path in shipped_modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {full.partition(".")[0] for full in names} - sys.stdlib_module_names:
                if distribution.get(top, top).lower() not in required:
                    missing.setdefault(top, []).append(name)
    assert missing == {}


def test_changelog_and_citation_are_of_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[:2] == ["Unreleased", manipulators.__version__]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (manipulators.__version__, "Apache-2.0")


# --- the wheel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names of the files in a wheel that is built from a copy of the repository."""
    copy, built = tmp_path_factory.mktemp("copy") / "main", tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".pytest_cache", ".ruff_cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(built)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_no_test(wheel):
    expected = {f"manipulators/{path.relative_to(ROOT).as_posix()}" for path in shipped_modules().values()}
    assert {name for name in wheel if name.endswith(".py")} == expected
    assert not any("tests/" in name or "benchmarks/" in name for name in wheel)


def test_the_wheel_holds_templates_recipes_and_type_mark(wheel):
    data = [*ROOT.glob("hub_cards/*.jinja"), *ROOT.glob("recipes/**/*.yaml"), ROOT / "py.typed"]
    assert len(data) >= 10
    for path in data:
        assert f"manipulators/{path.relative_to(ROOT).as_posix()}" in wheel
    assert any(name.endswith("entry_points.txt") for name in wheel)
    assert any(name.endswith("LICENSE") for name in wheel)


# --- importing --------------------------------------------------------------------------------------------


def test_bare_import_is_light():
    code = (
        "import sys, time; began = time.process_time(); import manipulators; took = time.process_time() - began\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'yaml'} & set(sys.modules)\n"
        "print(sorted(heavy), took < 0.3, manipulators.__version__)"
    )
    assert run(code) == f"[] True {manipulators.__version__}"


def test_every_public_name_resolves():
    assert len(manipulators.__all__) == len(set(manipulators.__all__))
    for name in manipulators.__all__:
        assert getattr(manipulators, name) is not None, name
    assert set(manipulators.__all__) <= set(dir(manipulators))


def test_public_classes_say_what_they_are():
    for name in set(manipulators.__all__) - {"__version__"}:
        value = getattr(manipulators, name)
        assert value.__module__.startswith("manipulators."), name
        assert value.__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'manipulators' has no attribute 'ACTPolizy'"):
        manipulators.ACTPolizy
    with pytest.raises(ImportError):
        from manipulators import nothing_of_this_name  # noqa: F401


def test_taking_any_public_name_registers_everything_but_a_claimed_name():
    """Transformers brings its own `act_policy` one day: importing still works, and it keeps its name."""
    code = (
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "CONFIG_MAPPING._mapping['act_policy'] = 'BertConfig'\n"
        "from manipulators import PolicyFeature\n"
        "from transformers import AutoConfig, AutoModel\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "config = AutoConfig.for_model('diffusion_policy')\n"
        "print(type(config).__name__, AutoModel._model_mapping[type(config)].__name__,"
        " 'robotics' in PIPELINE_REGISTRY.get_supported_tasks())\n"
        "from manipulators import AutoPolicy, PolicyPipeline\n"
        "from manipulators.modeling.registry import policy_class\n"
        "print('act_policy' in CONFIG_MAPPING._extra_content, policy_class('act_policy').__name__)"
    )
    assert run(code) == "DiffusionConfig DiffusionPolicy True\nFalse ACTPolicy"


TINY = {
    "chunk_size": 2,
    "dim_model": 8,
    "n_heads": 1,
    "dim_feedforward": 8,
    "n_encoder_layers": 1,
    "use_vae": False,
    "input_features": {"observation.state": {"type": "STATE", "shape": [1]}},
    "output_features": {"action": {"type": "ACTION", "shape": [1]}},
}


@pytest.fixture
def own_registries(monkeypatch):
    """Registrations of one test, forgotten afterwards."""
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    monkeypatch.setattr(MODEL_MAPPING, "_extra_content", dict(MODEL_MAPPING._extra_content))


def register_bert():
    """Register a policy under a name that belongs to transformers."""

    class BertPolicyConfig(manipulators.ACTConfig):
        model_type = "bert"

    @manipulators.register_policy("bert")
    class BertPolicy(manipulators.ACTPolicy):
        config_class = BertPolicyConfig

    return BertPolicy


def test_a_name_that_transformers_has_is_left_to_it(own_registries, tmp_path):
    policy_class = register_bert()
    assert type(AutoConfig.for_model("bert")) is BertConfig
    policy_class(policy_class.config_class(**TINY)).save_pretrained(tmp_path)
    assert type(manipulators.AutoPolicy.from_pretrained(tmp_path)) is policy_class  # our own mapping decides


def test_registering_such_a_name_twice_leaves_it_too(own_registries):
    register_bert()
    register_bert()
    assert type(AutoConfig.for_model("bert")) is BertConfig


def test_registering_a_policy_twice_takes_the_second(own_registries, tmp_path):
    """A notebook cell that is run twice."""

    def register():
        class CellConfig(manipulators.ACTConfig):
            model_type = "cell_policy"

        @manipulators.register_policy("cell_policy")
        class CellPolicy(manipulators.ACTPolicy):
            config_class = CellConfig

        return CellPolicy

    register()
    second = register()
    second(second.config_class(**TINY)).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is second.config_class
    assert type(AutoModel.from_pretrained(tmp_path)) is second
    assert type(manipulators.AutoPolicy.from_pretrained(tmp_path)) is second


# --- who imports whom -------------------------------------------------------------------------------------


def imports_of(name, path, toplevel_only=False):
    """Return the modules of this package that a module imports, as dotted names without `manipulators.`."""
    modules = shipped_modules()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes(tree, toplevel_only):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.partition(".")[0] != "manipulators", f"{name}: absolute import of the package itself"
            continue
        if node.level == 0:
            assert node.module.partition(".")[0] != "manipulators", f"{name}: absolute import of the package itself"
            continue
        parts = package.split(".") if package else []
        base = parts[: len(parts) - (node.level - 1)]
        base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            found.add(inner if inner in modules else base)
    return found


def nodes(tree, toplevel_only):
    """Return import statements; without those inside functions and `if TYPE_CHECKING:` when asked."""
    if not toplevel_only:
        return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        is_lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not is_lazy and not is_for_types:
            waiting.extend(ast.iter_child_nodes(node))
    return found


def room_of(name):
    """Return the folder of a module, or its own name when it stands at the root."""
    return name.partition(".")[0]


# Root files that hold no knowledge of policies: everybody may use them.
GROUND = {
    "errors",
    "families",
    "checkpoint",
    "plugins",
    "registration",
    "_disk",
    "_display",
    "_files",
    "_lock",
    "_processes",
}
GROUND |= {"_tokenizers", "_version", ""}
ALLOWED = {
    "configuration": set(),
    "modeling": {"configuration"},
    "processing": {"configuration"},
    "hub_cards": {"configuration"},
    "conversion": {"configuration", "modeling", "processing"},
    "data": {"configuration"},
    "recipes": set(),
    "errors": set(),
    "plugins": set(),
    "registration": set(),
    "families": set(),
    "checkpoint": set(),
    "_disk": set(),
    "_display": set(),
    "_files": set(),
    "_lock": set(),
    "_processes": set(),
    "_tokenizers": set(),
    "_version": set(),
}
# Inside functions: `push_to_hub` and `save_pretrained(push_to_hub=True)` publish with our card.
EXCEPTIONS = {("modeling.from_checkpoint", "hub_cards.publish"), ("processing.part_holder", "hub_cards.publish")}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_the_design_allows(room):
    modules = {name: path for name, path in shipped_modules().items() if room_of(name) == room}
    assert modules
    wrong = {
        (name, target)
        for name, path in modules.items()
        for target in imports_of(name, path)
        if room_of(target) not in GROUND | ALLOWED[room] | {room}
    }
    assert wrong - EXCEPTIONS == set()
    if room == "configuration":
        ground = {room_of(target) for name, path in modules.items() for target in imports_of(name, path)}
        assert ground <= {"configuration", "errors", "families"}


def test_nobody_below_imports_the_doors_or_the_rooms_above():
    above = {"auto", "cli", "__main__"}
    for name, path in shipped_modules().items():
        if room_of(name) in {"training", "inference", "evaluation"} | above:
            continue
        assert not {room_of(target) for target in imports_of(name, path)} & above, name


def test_no_shipped_module_imports_tests():
    for name, path in shipped_modules().items():
        assert not {room_of(target) for target in imports_of(name, path)} & NOT_SHIPPED, name


@pytest.mark.parametrize(("module", "target"), sorted(EXCEPTIONS))
def test_publishing_is_the_only_exception_and_lazy(module, target):
    path = shipped_modules()[module]
    assert target in imports_of(module, path)
    assert target not in imports_of(module, path, toplevel_only=True)


def cycle_in(graph):
    """Return a cycle of the graph as a list, or None."""
    state = {}

    def visit(node, trail):
        state[node] = "open"
        for target in sorted(graph.get(node, ())):
            if state.get(target) == "open":
                return [*trail[trail.index(target) :], target]
            if target not in state and (found := visit(target, [*trail, target])):
                return found
        state[node] = "done"
        return None

    for node in sorted(graph):
        if node not in state and (found := visit(node, [node])):
            return found
    return None


def test_modules_do_not_import_in_a_circle():
    graph = {name: imports_of(name, path, toplevel_only=True) - {name} for name, path in shipped_modules().items()}
    assert cycle_in(graph) is None


@pytest.mark.parametrize("room", ["data", "training", "evaluation"])
def test_not_even_inside_functions_or_for_types(room):
    graph = {
        name: imports_of(name, path) - {name} for name, path in shipped_modules().items() if room_of(name) == room
    }
    assert cycle_in(graph) is None


def test_rooms_do_not_import_in_a_circle():
    graph = {}
    for name, path in shipped_modules().items():
        if name in ("", "__main__", "cli"):
            continue
        for target in imports_of(name, path):
            if (name, target) not in EXCEPTIONS and room_of(target) != room_of(name) and target:
                graph.setdefault(room_of(name), set()).add(room_of(target))
    assert cycle_in(graph) is None


def test_the_cycle_finder_finds_cycles():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_every_module_can_be_imported_first():
    """No module relies on another having been imported before it."""
    names = [name for name in shipped_modules() if name not in ("", "__main__")]
    assert len(names) > 40
    light = [
        name
        for name in names
        if name in ("errors", "plugins", "_files", "cli", "recipes", "evaluation.simulators.metaworld.tasks")
    ]
    for name in light:
        run(f"import manipulators.{name}")
    for name in names:
        importlib.import_module(f"manipulators.{name}")
