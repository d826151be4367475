"""transformers knows our policies, whichever of the two is imported first, and a bare import stays light."""

import importlib
import os
import subprocess
import sys

import pytest

from manipulators import registration
from manipulators.errors import PluginError

KNOWN = "print(AutoConfig.for_model('act_policy').title, end=' ')\n"
ORDERS = {
    "manipulators first": "import manipulators\nfrom transformers import AutoConfig\n",
    "transformers first": "from transformers import AutoConfig\nimport manipulators\n",
    "libraries between that import it": "import manipulators, peft\nfrom transformers import Trainer, AutoConfig\n",
    "a module of ours first": "import manipulators.processing.processor\nfrom transformers import AutoConfig\n",
}


def run(code, site=None):
    paths = [str(site)] if site else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "has not registered" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_knows_our_policies(order, tmp_path):
    """From a module too, which is itself only half imported while it imports."""
    (tmp_path / "own_module.py").write_text(ORDERS[order])
    code = "from own_module import AutoConfig\n" + KNOWN
    code += (
        "from transformers import AutoModel, AutoProcessor, pipeline\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "from transformers.models.auto.processing_auto import processor_class_from_name\n"
        "print(AutoModel._model_mapping[type(AutoConfig.for_model('gr00t_n1'))].__name__, "
        "processor_class_from_name('PI0PolicyProcessor').__name__, PIPELINE_REGISTRY.check_task('robotics')[0])"
    )
    assert run(code, tmp_path) == "ACT GR00TN1Policy PI0PolicyProcessor robotics\n"


def test_importing_both_loads_nothing_heavy():
    """transformers itself is lazy, and stays so."""
    code = "import manipulators, transformers, sys; print({'torch', 'manipulators.auto'} & set(sys.modules))"
    assert run(code) == "set()\n"


def test_a_failure_is_a_warning_for_who_imports_transformers(monkeypatch):
    def fail():
        raise PluginError("my_robot", ImportError("no such library"), "my_robot")

    monkeypatch.setattr(registration, "register_all", fail)
    monkeypatch.setattr(registration, "AUTO_CLASSES", "sys")  # imported
    with pytest.warns(UserWarning, match=r"has not registered everything with transformers: PluginError: .*my_robot"):
        registration._Watcher().register_if_possible()


def test_nothing_is_done_in_the_middle_of_an_import_or_twice(monkeypatch):
    calls = []
    monkeypatch.setattr(registration, "register_all", lambda: calls.append(1))
    monkeypatch.setattr(registration, "AUTO_CLASSES", "sys")
    watcher = registration._Watcher()
    watcher._imports.open = 1
    watcher.register_if_possible()
    watcher._imports.open, watcher.is_done = 0, True
    watcher.register_if_possible()
    assert watcher.find_spec("transformers.no_such_module") is None
    assert calls == []


def test_it_finds_what_the_others_find_and_leaves_the_loader_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(registration, "register_all", lambda: None)
    monkeypatch.setattr(registration, "WATCHED", {"watched_library"})
    (tmp_path / "watched_library.py").write_text("value = 1\n")
    (tmp_path / "broken_library.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    watcher = registration._Watcher()
    monkeypatch.setattr(sys, "meta_path", [watcher, registration._Watcher(), *sys.meta_path])
    library = importlib.import_module("watched_library")
    assert library.value == 1 and watcher._imports.open == 0
    assert "exec_module" not in vars(library.__loader__)
    assert watcher.find_spec("watched_library.inner") is None
    monkeypatch.setattr(registration, "WATCHED", {"broken_library"})
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module("broken_library")
    assert watcher._imports.open == 0
