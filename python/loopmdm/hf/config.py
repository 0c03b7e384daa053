"""The configuration of a LoopMDM as transformers keeps it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from loopmdm.model.config import LoopMDMConfig

# transformers' own names. It keeps `max_length` for generation, so here the field has no other name.
_LENGTH = "max_position_embeddings"
_FIELDS = [field.name for field in dataclasses.fields(LoopMDMConfig)]


class LoopMDMPretrainedConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`LoopMDMConfig` with the names of transformers beside its own.

    Args:
        values: the fields of `LoopMDMConfig`, of which `vocab_size` and `mask_token_id` are needed;
            `num_hidden_layers`, `num_attention_heads` and `max_position_embeddings` stand for `num_layers`,
            `num_heads` and `max_length`. `suppress_mask_token`: whether the mask token's logit is that of a
            token that is never drawn, as in MDLM's SUBS; False: what the network computes. And what
            `PretrainedConfig` takes.

    Raises:
        ValueError, TypeError: as `LoopMDMConfig`.
    """

    model_type = "loopmdm"
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}  # noqa: RUF012
    has_no_defaults_at_init = True

    def __init__(self, **values: Any) -> None:
        renamed = {**self.attribute_map, _LENGTH: "max_length"}
        own = {ours: values.pop(theirs) for theirs, ours in renamed.items() if theirs in values}
        own |= {name: values.pop(name) for name in _FIELDS if name in values}
        suppressed = values.pop("suppress_mask_token", True)
        if not isinstance(suppressed, bool):
            raise TypeError(f"suppress_mask_token: got {suppressed!r}, expected bool")
        config = LoopMDMConfig.from_dict(own)
        super().__init__(**{"tie_word_embeddings": False, **values})
        for name, value in config.to_dict().items():
            setattr(self, _LENGTH if name == "max_length" else name, value)
        self.suppress_mask_token = suppressed

    def to_loopmdm(self) -> LoopMDMConfig:
        """The same as a `LoopMDMConfig`."""
        return LoopMDMConfig(
            **{name: getattr(self, _LENGTH if name == "max_length" else name) for name in _FIELDS}
        )
