"""Robot-manipulation policies as ordinary 🤗 models.

`import manipulators` loads neither torch nor transformers; the first public name that is taken does. Every policy,
installed plugins' too, is then registered with AutoConfig, AutoModel, AutoProcessor and the pipeline registry.
The same happens when transformers' Auto classes are imported, before or after.
"""

from importlib import import_module

from ._version import __version__
from .families import FAMILIES
from .registration import register_all, register_when_needed

# Public name → the module that defines it: configs and policies, then their components and the rest.
_EXPORTS = {
    name: module
    for family in FAMILIES.values()
    for module, name in (family.config.split(":"), family.policy.split(":"))
} | {
    "ACTActionHead": "modeling.action_heads.act",
    "ACTBackbone": "modeling.backbones.act",
    "DiffusionActionHead": "modeling.action_heads.diffusion",
    "DiffusionRgbEncoder": "modeling.backbones.diffusion_rgb",
    "EagleBackbone": "modeling.backbones.eagle",
    "EagleBackbone1_5": "modeling.backbones.eagle_1_5",
    "EagleConfig": "configuration.eagle",
    "EagleConfig1_5": "configuration.eagle",
    "FlowmatchingActionHead": "modeling.action_heads.flow_matching",
    "FlowmatchingActionHeadConfig": "configuration.flow_matching",
    "FlowmatchingActionHeadConfig_1_5": "configuration.flow_matching",
    "FlowmatchingActionHead_1_5": "modeling.action_heads.flow_matching_1_5",
    "PI05FlowMatching": "modeling.action_heads.pi05",
    "PI0FlowMatching": "modeling.action_heads.pi0",
    "PaliGemmaWithExpertConfig": "configuration.pi0",
    "PaliGemmaWithExpertModel": "modeling.backbones.paligemma_with_expert",
    # what they are made of
    "AutoPolicy": "auto",
    "BasePolicyModel": "modeling.custom",
    "FeatureType": "configuration.features",
    "NormalizationMode": "configuration.features",
    "PolicyCollator": "training.collator",
    "PolicyConfig": "configuration.policy",
    "PolicyFeature": "configuration.features",
    "PolicyModel": "modeling.policy",
    "PolicyOutput": "modeling.output",
    "PolicyPipeline": "inference.pipeline",
    "PolicyProcessor": "processing.processor",
    "PolicyTrainer": "training.trainer",
    "PolicyTrainingArguments": "training.arguments",
    "Draws": "modeling.seam",
    "Features": "modeling.seam",
    "Labels": "modeling.seam",
    "PolicyInputs": "modeling.seam",
    "register_action_head": "modeling.components",
    "register_backbone": "modeling.components",
    "register_policy": "modeling.registry",
    "register_processor": "processing.registry",
    # data, training, inference, evaluation
    "EnvironmentSpec": "evaluation.specification",
    "EvaluationResult": "evaluation.rollout",
    "LeRobotDataset": "data.dataset",
    "LeRobotWriter": "data.recording.writer",
    "check_statistics": "data.editing.recomputing",
    "MixtureDataset": "data.mixture",
    "StreamingLeRobotDataset": "data.streaming.dataset",
    "convert_dataset": "data.convert",
    "evaluate": "evaluation.rollout",
    "load_published": "conversion.published",
    "load_plugins": "plugins",
    "merge_datasets": "data.editing.merging",
    "recompute_statistics": "data.editing.recomputing",
    "retask_dataset": "data.editing.retasking",
    "select_from_dataset": "data.editing.selecting",
    "split_dataset": "data.editing.selecting",
    "measure_speed": "inference.speed",
    "merge_and_save": "training.tuning",
    "parameter_table": "training.tuning",
    "record_demonstrations": "evaluation.demonstrations",
    "register_environment": "evaluation.registry",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'manipulators' has no attribute {name!r}")
    register_all()
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_needed()
