"""PartHolder: the half of a processor that holds its parts, and saves and loads their fields."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from transformers import ProcessorMixin

from ..checkpoint import CONFIG_FILE, split_publishing
from ..configuration.features import PolicyFeature
from ..configuration.policy import FORMAT_VERSION
from ..errors import CheckpointError, MissingFileError, UnknownConfigFieldError
from .instruction import Instruction
from .loading import load_processor
from .observation import ObservationReader
from .part import ProcessorPart, as_mapping
from .pictures import Pictures
from .robots import Robots
from .vectors import Vectors

# What each of several robots may have of its own.
_OF_ROBOT = ("input_features", "output_features", "dimension_names", "units")


class PartHolder(ProcessorMixin):
    """Hold the parts of a processor; their fields are its arguments, its attributes and its processor_config.json.

    Arguments and errors are those of `PolicyProcessor`.
    """

    reader_class: ClassVar[type[ObservationReader]] = ObservationReader
    robots_class: ClassVar[type[Robots]] = Robots
    pictures_class: ClassVar[type[Pictures]] = Pictures
    vectors_class: ClassVar[type[Vectors]] = Vectors
    instruction_class: ClassVar[type[Instruction] | None] = None

    def __init__(
        self,
        input_features=None,
        output_features=None,
        normalization_mapping=None,
        statistics=None,
        tokenizer=None,
        dimension_names=None,
        units=None,
        format_version=FORMAT_VERSION,
        **fields,
    ):
        features = {"input_features": input_features, "output_features": output_features}
        for kind, given in features.items():
            given = as_mapping(kind, given)
            setattr(self, kind, {name: PolicyFeature.from_value(feature) for name, feature in given.items()})
        self.dimension_names, self.units, self.format_version = dimension_names, units, format_version
        known = self.field_names() + self.get_attributes()
        fields |= {"normalization_mapping": normalization_mapping, "statistics": statistics}
        for name in [*fields, *(["tokenizer"] if tokenizer is not None else [])]:
            if name not in known:
                raise UnknownConfigFieldError(type(self).__name__, name, known)
        self._of_all: dict[str, Any] = {}  # what is saved where the features in use are those of one of several robots
        self.robots = self._built(self.robots_class, fields)
        self._use_features_of_robot()
        resizes = self.pictures_class.resizes
        self.reader = self._built(self.reader_class, fields, robots=self.robots, resizes_pictures=resizes)
        self.pictures = self._built(self.pictures_class, fields, robots=self.robots)
        self.vectors = self._built(self.vectors_class, fields, robots=self.robots)
        if self.instruction_class is None:
            self.instruction = None
            super().__init__()
        else:
            self.instruction = self._built(self.instruction_class, fields, tokenizer=tokenizer)
            super().__init__(tokenizer=self.instruction.tokenizer)

    def _built(self, part_class: type[ProcessorPart], fields: Mapping[str, Any], **given: Any) -> Any:
        own = {name: fields[name] for name in part_class.field_names() if name in fields}
        part = part_class(inputs=self.input_features, outputs=self.output_features, **given, **own)
        self.__dict__.setdefault("_part_of", {}).update(dict.fromkeys(part_class.field_names(), part))
        return part

    # --- one of several robots ----------------------------------------------------------------------

    def choose_embodiment(self, name: str) -> None:
        """Serve one of the robots that the processor knows; raises `EmbodimentError` for another."""
        self.robots.choose(name)
        self._use_features_of_robot()

    def for_embodiment(self, name: str) -> PartHolder:
        """Return a processor that serves one of the robots that this one knows, and shares its tokenizer.

        Raises:
            EmbodimentError: it does not know the robot.
        """
        twin = copy.copy(self)
        parts = {id(part): copy.copy(part) for part in self._parts}
        for attribute, part in vars(self).items():
            if id(part) in parts:
                twin.__dict__[attribute] = parts[id(part)]
        twin.__dict__["_part_of"] = {field: parts[id(part)] for field, part in self._part_of.items()}
        for part in parts.values():
            if hasattr(part, "robots"):
                part.robots = twin.robots
        twin.__dict__["_of_all"] = dict(self._of_all)
        twin.choose_embodiment(name)
        return twin

    @property
    def _parts(self) -> list[ProcessorPart]:
        held = (self.robots, self.reader, self.pictures, self.vectors, self.instruction)
        return [part for part in held if part is not None]

    def _use_features_of_robot(self) -> None:
        """Give the parts the features of the robot in use, as wide as they are; what is saved stays of all robots."""
        if not self.robots.embodiment_features:
            return
        if not self._of_all:
            self._of_all = {name: getattr(self, name) for name in _OF_ROBOT}
        own = self.robots.features
        self.input_features = {name: own[name] for name in self._of_all["input_features"]}
        self.output_features = {name: own[name] for name in self._of_all["output_features"]}
        self.dimension_names = self.robots.described("names") or self._of_all["dimension_names"]
        self.units = self.robots.described("units") or self._of_all["units"]
        for part in self._parts if "instruction" in vars(self) else ():
            if part is not self.robots:
                part.inputs, part.outputs = self.input_features, self.output_features

    def of_all_robots(self, name: str) -> Any:
        """Return a field as it is saved: `input_features` and the like of all robots, whichever is in use."""
        return self._of_all.get(name, getattr(self, name))

    # A field lives in its part; reading and setting it here reaches it there.
    def __getattr__(self, name: str) -> Any:
        part = self.__dict__.get("_part_of", {}).get(name)
        if part is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        part = self.__dict__.get("_part_of", {}).get(name)
        if part is None:
            super().__setattr__(name, value)
        else:
            part.change(name, value)

    @property
    def tokenizer(self) -> Any:
        """The instruction's tokenizer; without one, what transformers' Trainer looks for: no special tokens."""
        if self.instruction is None:
            return SimpleNamespace(eos_token_id=None, bos_token_id=None, pad_token_id=None)
        return self.instruction.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.instruction.tokenizer = value

    # --- names of the fields ------------------------------------------------------------------------

    @classmethod
    def _part_classes(cls) -> list[type[ProcessorPart]]:
        parts = (cls.reader_class, cls.robots_class, cls.pictures_class, cls.vectors_class, cls.instruction_class)
        return [part for part in parts if part is not None]

    @classmethod
    def config_fields(cls) -> list[str]:
        """Return the names of the fields that the policy's config has too."""
        names = [name for part in cls._part_classes() for name in part.config_fields]
        return ["input_features", "output_features", *names]

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of the fields in processor_config.json: of the parts, and of a subclass's constructor."""
        parts = [name for part in cls._part_classes() for name in part.field_names()]
        names = ["input_features", "output_features", *parts, "dimension_names", "units", "format_version"]
        for base in cls.__mro__[: cls.__mro__.index(PartHolder)]:
            parameters = inspect.signature(vars(base).get("__init__", PartHolder.__init__)).parameters.values()
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return [name for name in dict.fromkeys(names) if name not in ("self", "tokenizer")]

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return what `ProcessorMixin` saves in files of its own."""
        return [] if cls.instruction_class is None else ["tokenizer"]

    # --- saving and loading ---------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in the order of the file that they were loaded from."""
        names = dict.fromkeys((*self.__dict__.get("_loaded_order", ()), *self.field_names()))
        values = {name: self.of_all_robots(name) for name in names}
        if values["embodiment_features"] is None:  # as older versions read it, where it says nothing
            del values["embodiment_features"]
        for kind in ("input_features", "output_features"):
            values[kind] = {name: feature.to_dict() for name, feature in values[kind].items()}
        return copy.deepcopy(values) | {"processor_class": type(self).__name__}

    def to_json_string(self) -> str:
        """Return the text of processor_config.json; keys keep their order, which is the order of the cameras."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(self, save_directory, **kwargs) -> Any:
        """Save processor_config.json and the tokenizer's files.

        With `push_to_hub=True` they are published, with what else of a checkpoint is in the folder; `repo_id`,
        `private`, `revision`, … as in `push_to_hub`.
        """
        kwargs, publishing = split_publishing(kwargs)
        for name in ("is_local", "local_files_only"):  # how transformers loaded it, which is no part of it
            getattr(self.tokenizer, "init_kwargs", {}).pop(name, None)
        saved = super().save_pretrained(save_directory, **kwargs)
        if publishing is not None:
            from ..hub_cards.publish import publish_folder

            repo_id = publishing.pop("repo_id", None) or Path(save_directory).absolute().name
            if Path(save_directory, CONFIG_FILE).is_file():
                publish_folder(save_directory, repo_id, **publishing)
            else:
                self.push_to_hub(repo_id, **publishing)
        return saved

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the processor alone into the repository of its policy, whose card stays as it is but for `tags`.

        Args:
            repo_id: `org/name`.
            kwargs: `commit_message`, `private`, `token`, `revision`, `create_pr`, `tags`.

        Returns:
            The commit's address. To publish a whole checkpoint: `policy.push_to_hub(repo_id, processor=processor)`.
        """
        # The room of cards stands beside this one; only publishing looks into it.
        from ..hub_cards.publish import publish_processor

        return publish_processor(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> PartHolder:
        """Load the processor of a checkpoint folder or Hub id.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            kwargs: `subfolder`, `revision`, `token`, …; saved fields to change, such as `rename_map`; `tokenizer`
                instead of the one that was saved with it: a tokenizer, or a folder or Hub id that holds one.

        Raises:
            MissingFileError, CorruptFileError: processor_config.json is absent, or holds no JSON mapping.
            UnknownConfigFieldError: an argument is none of these.
        """
        return load_processor(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build the processor from saved JSON; a field of it that does not exist here raises."""
        if not processor_dict:
            raise MissingFileError(
                "There is no processor_config.json, without which a policy's numbers mean nothing. It is written by "
                "PolicyPipeline.save_pretrained, or processor.save_pretrained beside the policy's."
            )
        fields = {name: value for name, value in processor_dict.items() if name not in ("processor_class", "auto_map")}
        known = cls.field_names()
        unknown = fields.keys() - set(known)
        if unknown and not fields.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise CheckpointError(
                f"processor_config.json has unknown fields: {', '.join(sorted(unknown))}. Known: {', '.join(known)}."
            )
        return_unused = kwargs.pop("return_unused_kwargs", False)
        attributes = dict(zip(cls.get_attributes(), args, strict=True))  # loaded from files of their own
        fields = {name: value for name, value in fields.items() if name in known}
        processor = cls(**attributes, **fields)
        processor._loaded_order = list(fields)
        return (processor, kwargs) if return_unused else processor
