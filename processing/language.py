"""LanguageProcessor: a policy's processor that also turns the instruction into token ids."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import BatchFeature, PreTrainedTokenizerBase

from .._tokenizers import load_tokenizer
from ..configuration.policy import PolicyConfig
from ..errors import FeatureShapeError, FeatureValueError, MissingFeatureError, MissingTokenizerError
from .processor import PolicyProcessor

TASK = "task"


class LanguageProcessor(PolicyProcessor):
    """Prepare observations with an instruction, for policies that read one.

    The tokenizer's files are saved beside processor_config.json.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the policy's language model.
        max_instruction_tokens (`int`): n, tokens per instruction; shorter ones are padded on the right, longer ones
            cut.
        kwargs: what `PolicyProcessor` takes.

    Raises:
        MissingTokenizerError: there is no tokenizer.
    """

    compared_fields: ClassVar[tuple[str, ...]] = (*PolicyProcessor.compared_fields, "max_instruction_tokens")

    def __init__(self, tokenizer=None, max_instruction_tokens=None, **kwargs):
        if tokenizer is None:
            raise MissingTokenizerError(None)
        super().__init__(tokenizer=tokenizer, **kwargs)
        self.max_instruction_tokens = max_instruction_tokens

    @classmethod
    def from_config(
        cls,
        config: PolicyConfig,
        statistics: Mapping | None = None,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> LanguageProcessor:
        """Build the processor of a policy's config from a dataset's statistics.

        Args:
            config: the policy's, with features set.
            statistics: see `PolicyProcessor.from_config`.
            tokenizer: a tokenizer, or a folder or Hub id that holds one; by default the config's `tokenizer_name`.
            kwargs: what the constructor takes.

        Raises:
            MissingTokenizerError: it cannot be had.
        """
        return super().from_config(
            config,
            statistics,
            tokenizer=load_tokenizer(tokenizer if tokenizer is not None else config.tokenizer_name),
            max_instruction_tokens=config.max_instruction_tokens,
            **kwargs,
        )

    def prompt(self, task: str) -> str:
        """Return the text that is tokenised for an instruction; subclasses add what their language model was shown."""
        return task

    def __call__(
        self,
        observation: Mapping[str, Any],
        task: str | list[str] | None = None,
        actions: Any = None,
        action_is_pad: Any = None,
    ) -> BatchFeature:
        """Return normalised model inputs, with a batch dimension.

        Args:
            observation, actions, action_is_pad: see `PolicyProcessor`.
            task: the instruction, one for the whole batch or one each; by default the observation's `task`.

        Returns:
            What `PolicyProcessor` returns, and `input_ids` (b, n), `attention_mask` (b, n), 1 at real tokens.

        Raises:
            MissingFeatureError: there is no instruction.
        """
        inputs = super().__call__(observation, task, actions, action_is_pad)
        first = next(iter(inputs.values()))
        batch_size = len(first[0] if isinstance(first, list) else first)
        task = observation.get(TASK) if task is None else task
        return BatchFeature(data=dict(inputs) | self.encode_instruction(task, batch_size, inputs))

    def encode_instruction(
        self, task: str | list[str] | None, batch_size: int, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return `input_ids` (b, n) and `attention_mask` (b, n) of one instruction for all, or of one each.

        `inputs` is what else was prepared, for language models whose text also says where the pictures stand.
        """
        encoded = self.tokenizer(
            [self.prompt(text) for text in self.read_instructions(task, batch_size)],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.max_instruction_tokens,
            return_tensors="pt",
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}  # (b, n) each

    def read_instructions(self, task: str | list[str] | None, batch_size: int) -> list[str]:
        """Return one instruction for each observation of a batch.

        Raises:
            MissingFeatureError: there is none.
            FeatureValueError, FeatureShapeError: something else than text, or another number.
        """
        if task is None:
            raise MissingFeatureError([TASK], (), [*self.input_features, TASK])
        texts = [task] * batch_size if isinstance(task, str) else list(task)
        for text in texts:
            if not isinstance(text, str):
                raise FeatureValueError(f"An instruction is a str; got {text!r}.")
        if len(texts) != batch_size:
            raise FeatureShapeError(TASK, (len(texts),), f"one instruction, or one for each of {batch_size}")
        return texts
