"""A processor's fields live in its parts: given, read, set, saved and changed at loading, for every processor."""

import copy
import json
import pickle

import pytest
from transformers import AutoProcessor

from manipulators import PolicyProcessor
from manipulators.errors import EmbodimentError, UnknownConfigFieldError
from manipulators.processing.pi0 import PI0PolicyProcessor
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

WRIST = "observation.images.wrist"
FIELDS = {
    "rename_map": {"front": WRIST},
    "relative_to": [0, None],
    "optional_cameras": [WRIST],
    "normalization_eps": 1e-6,
    "dimension_names": {"action": ["x", "grip"]},
    "units": {"action": ["m", "1"]},
}


@pytest.fixture(params=["act", "diffusion", "pi0", "gr00t_n1_5"])
def config(request, tiny_act, tiny_diffusion, tiny_pi0, tiny_gr00t_n1_5):
    cameras = {"wrist": (3, 28, 28)}
    if request.param == "act":
        return tiny_act(cameras)
    if request.param == "diffusion":
        language = {"use_language_conditioning": True, "language_config": {"hidden_size": 16}}
        return tiny_diffusion(cameras, **language)
    return {"pi0": tiny_pi0, "gr00t_n1_5": tiny_gr00t_n1_5}[request.param](cameras)


def build(config, statistics_of, **fields):
    tokenizer = {"tokenizer": word_tokenizer(["press it"])} if config.reads_instruction else {}
    return processor_class(config).from_config(config, statistics_of(config), **tokenizer, **fields)


def test_every_saved_field_is_taken(config, statistics_of):
    processor = build(config, statistics_of, **FIELDS)
    assert {name: getattr(processor, name) for name in FIELDS} == FIELDS
    saved = processor.to_dict()
    assert {name: saved[name] for name in FIELDS} == FIELDS
    only_of_several_robots = {"embodiment_features"}
    assert set(saved) == {*processor.field_names(), "processor_class"} - only_of_several_robots


def test_fields_are_changed_at_loading(config, statistics_of, tmp_path):
    """And do not end up among the tokenizer's."""
    build(config, statistics_of).save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved", **FIELDS)
    assert type(loaded) is processor_class(config)
    assert {name: getattr(loaded, name) for name in FIELDS} == FIELDS
    loaded.save_pretrained(tmp_path / "again")
    if config.reads_instruction:
        saved = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
        assert not saved.keys() & FIELDS.keys()


def test_saving_loading_and_saving_gives_the_same_files(config, statistics_of, tmp_path):
    build(config, statistics_of, **FIELDS).save_pretrained(tmp_path / "once")
    AutoProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name


def test_another_tokenizer_at_loading(tiny_pi0, statistics_of, tmp_path):
    build(tiny_pi0(), statistics_of).save_pretrained(tmp_path)
    other = word_tokenizer(["open the drawer"])
    assert PI0PolicyProcessor.from_pretrained(tmp_path, tokenizer=other).tokenizer is other


def test_fields_that_no_part_has(config, statistics_of):
    with pytest.raises(UnknownConfigFieldError, match=r"no field 'renames'\. Did you mean 'rename_map'"):
        build(config, statistics_of, renames={})
    with pytest.raises(UnknownConfigFieldError, match="PolicyProcessor has no field 'tokenizer'"):
        PolicyProcessor(tokenizer=word_tokenizer(["press"]))


def test_a_field_is_the_part_s(plain):
    plain.rename_map = {"hand": WRIST}
    assert plain.reader.rename_map == {"hand": WRIST} and "rename_map" not in vars(plain)
    with pytest.raises(AttributeError, match="PolicyProcessor has no attribute 'max_state_dim'"):
        plain.max_state_dim


class Shifting(PolicyProcessor):
    """A processor with a field of its own."""

    def __init__(self, shift=0.0, **fields):
        super().__init__(**fields)
        self.shift = shift


def test_field_of_a_subclass(tiny_act, statistics_of, tmp_path):
    config = tiny_act()
    processor = Shifting.from_config(config, statistics_of(config), shift=2.0)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["shift"] == 2.0
    assert Shifting.from_pretrained(tmp_path).shift == 2.0
    assert Shifting.from_pretrained(tmp_path, shift=3.0).shift == 3.0


def test_without_actions_there_is_no_range():
    assert PolicyProcessor().action_range() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_are_whole(plain, copied):
    other = copied(plain)
    other.rename_map = {"hand": WRIST}
    assert other.to_dict() == plain.to_dict() | {"rename_map": {"hand": WRIST}}
    assert other.reader.rename_map and not plain.reader.rename_map


def test_unknown_robots_say_what_exists(tiny_act, tiny_gr00t_n1_5, statistics_of):
    with pytest.raises(
        EmbodimentError, match="no embodiment 'gr1': the statistics are of one robot, which has no name"
    ):
        build(tiny_act(), statistics_of).choose_embodiment("gr1")
    config = tiny_gr00t_n1_5()
    processor = build(config, statistics_of)
    slots = ", ".join(sorted(config.embodiment_ids))
    with pytest.raises(EmbodimentError, match=rf"no embodiment 'mine'. There are slots for: {slots}\."):
        processor.choose_embodiment("mine")
    other = next(name for name in config.embodiment_ids if name != processor.embodiment)
    with pytest.raises(EmbodimentError, match=rf"'{other}'. There are statistics for: {processor.embodiment}\."):
        processor.choose_embodiment(other)
