"""Captions to umT5 states."""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from wan_accel.data.captions import caption_id
from wan_accel.models.encoders import TextEncoder
from wan_accel.models.variants import TEXT_LENGTH

logger = logging.getLogger(__name__)

# The prompt that Wan's own sampling steers away from (wan/configs/shared_config.py, `sample_neg_prompt`).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
# What a dropped caption becomes, and what guidance is computed against.
NULL_PROMPTS = {"empty_prompt": "", "negative_prompt": NEGATIVE_PROMPT}


class EncodedCaption(NamedTuple):
    """A caption with its states (L, text_dim), trimmed to its own length, on the CPU."""

    caption_id: str
    caption: str
    embeddings: Tensor


def encode_captions(encoder: TextEncoder, captions: Iterable[str], *, batch_size: int = 8) -> Iterator[EncodedCaption]:
    """Encode each distinct caption once, in the order of first appearance."""
    distinct = list(dict.fromkeys(captions))
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        for caption, states in zip(batch, encoder.encode(batch)):
            if encoder.is_cut(caption):
                logger.warning(
                    "a caption has more than %d tokens, the rest is not seen: %.60s...", TEXT_LENGTH, caption
                )
            yield EncodedCaption(caption_id(caption), caption, states.cpu())
