"""CLIP's text encoder, frozen: an instruction to one vector (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.utils import logging

from ...configuration.strict import part_config
from ...errors import InvalidConfigError

logger = logging.get_logger(__name__)


def build_text_encoder(name: str | None, fields: dict[str, Any] | None) -> CLIPTextModelWithProjection:
    """Build a frozen text encoder.

    Args:
        name: Hub id or folder of its weights. Not read while transformers loads a checkpoint (on the meta device),
            which holds them.
        fields: of `transformers.CLIPTextConfig`; by default those found at `name`. Without `name` the encoder is
            random until weights are loaded into it.

    Raises:
        InvalidConfigError: the weights cannot be loaded, or are of another network than `fields`.
    """
    loads_checkpoint = torch.get_default_device().type == "meta"
    if fields is not None and (name is None or loads_checkpoint):
        if not loads_checkpoint:
            logger.warning(
                "language_config without language_model_name: the frozen text encoder is random until weights are "
                "loaded into it."
            )
        encoder = part_config("language_config", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**fields)))
    else:
        encoder = _load_start_weights(name, fields)
    return encoder.requires_grad_(False).eval()


def _load_start_weights(name: str, fields: dict[str, Any] | None) -> CLIPTextModelWithProjection:
    remedy = (
        "Set language_model_name to a folder that holds a CLIP model, or describe one whose weights are loaded later "
        "by language_config={…} and language_model_name=None."
    )
    try:
        if fields is None:
            config = CLIPTextConfig.from_pretrained(name)
        else:
            config = part_config("language_config", CLIPTextConfig, **fields)
        encoder, info = CLIPTextModelWithProjection.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"The text encoder {name!r} could not be read: {error}\n{remedy}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InvalidConfigError(f"{name!r} holds another text encoder than language_config describes. {remedy}")
    return encoder
