"""A row of a latents folder to the denoiser's inputs: its cells, or what stands in for them, joined together."""

import numpy as np
import torch
from torch import Tensor

from wan_accel.data.cells import LatentsError, cell_to_tensor
from wan_accel.data.nulls import Nulls, bucket_key
from wan_accel.data.rows import Row
from wan_accel.draws import NO_KNOWN, SampleDraw
from wan_accel.models.conditioning.animate import NUM_MASK_CHANNELS, join_condition
from wan_accel.models.conditioning.image import join_first_frame
from wan_accel.models.variants import Variant

_OF_THE_VIDEO = ("latents", "image_latents", "pose_latents")  # columns of the video's own size


def inputs_of(row: Row, latents: Tensor, draw: SampleDraw, nulls: Nulls) -> dict[str, Tensor]:
    """Latents and conditions of a draw, but for noise and text, without a batch dim.

    For Animate, frame 0 of `latents` and `condition` is the reference slot.

    Args:
        row: of the clips part.
        latents: its own, (C, F, h, w).
        draw: what is dropped, and which known variant it has.
        nulls: of the folder.

    Raises:
        LatentsError: the draw needs a null row that was not cached.
    """
    inputs = {"latents": latents}
    if row.get("image_latents") is not None:
        inputs["condition"] = join_first_frame(cell_to_tensor(row["image_latents"]))
    if row["clip_features"] is not None:
        inputs["clip_features"] = cell_to_tensor(row["clip_features"])
    if row["reference_latents"] is not None:
        reference = cell_to_tensor(row["reference_latents"])
        inputs |= {
            "latents": torch.cat([reference, latents], dim=1),
            "condition": _known_condition(row, draw, reference, nulls),
            "pose_latents": cell_to_tensor(row["pose_latents"]),
            "motion_vectors": _motion(row, draw, nulls),
        }
    return inputs


def check_shapes(row: Row, draw: SampleDraw, variant: Variant) -> None:
    """Refuse latents and conditions of other shapes than the row's bucket has, before their data is read.

    Raises:
        LatentsError: both shapes of the first that differs, and what to do.
    """
    frames, height, width = row["num_frames"], row["height"], row["width"]
    (stride_t, stride_h, stride_w), channels = variant.vae.stride, variant.vae.latent_channels
    hw = (height // stride_h, width // stride_w)
    video = (channels, (frames - 1) // stride_t + 1, *hw)
    found = {name: row.shape(name) for name in (*_OF_THE_VIDEO, "reference_latents", "motion_vectors")}
    expected = {**dict.fromkeys(_OF_THE_VIDEO, video), "reference_latents": (channels, 1, *hw)}
    expected["motion_vectors"] = (frames, *(found["motion_vectors"] or ())[1:])
    if draw.known != NO_KNOWN:
        found["known latents"], expected["known latents"] = row.shape("known", draw.known, "latents"), video
    for name, shape in found.items():
        if shape is not None and shape != expected[name]:
            # The cache passes over rows that are there already, so that running it again mends none.
            raise LatentsError(
                f"{name} {shape} where the bucket of {frames} frames of {height}x{width} needs {expected[name]}: the "
                "row was written by something else; encode into a new data.latents folder"
            )


def _motion(row: Row, draw: SampleDraw, nulls: Nulls) -> Tensor:
    motion = cell_to_tensor(row["motion_vectors"])
    return nulls.get("face").expand(len(motion), -1).clone() if draw.drop_face else motion


def _known_condition(row: Row, draw: SampleDraw, reference: Tensor, nulls: Nulls) -> Tensor:
    known = row.item("known", draw.known) if draw.known != NO_KNOWN else None
    if known is None or known["latents"] is None:
        latents = nulls.get("animation_known", bucket_key(row["num_frames"], row["height"], row["width"]))
        mask = latents.new_zeros(NUM_MASK_CHANNELS, *latents.shape[1:])
        return join_condition(reference, mask, latents)
    latents = cell_to_tensor(known["latents"])
    mask_shape = (NUM_MASK_CHANNELS, *latents.shape[1:])
    bits = np.unpackbits(np.frombuffer(known["mask_bits"], dtype=np.uint8), count=int(np.prod(mask_shape)))
    return join_condition(reference, torch.from_numpy(bits).reshape(mask_shape), latents)
