"""What an export reads and how it is written, decided before anything is."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_accel.checkpoint import Manifest, read_manifest
from wan_accel.export_lora import LORA_LAYOUTS
from wan_accel.models.hub import is_hub_id
from wan_accel.models.variants import BOTH, Variant, get_variant
from wan_accel.recipe.load import load_recipe
from wan_accel.recipe.schema import Recipe

logger = logging.getLogger(__name__)

LAYOUTS = {"lora": LORA_LAYOUTS, "full": ("original",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """One export: what is read, and how it is written.

    recipe: the run's, None where its recipe.yaml is gone.
    recipe_hash: first 16 digits of the sha256 of recipe.yaml.
    """

    checkpoint: Path
    manifest: Manifest
    recipe: Recipe | None
    recipe_hash: str
    layout: str
    dtype: torch.dtype | None
    merge: bool
    ema: bool

    @property
    def variant(self) -> Variant:
        return get_variant(self.manifest.variant)

    @property
    def experts(self) -> list[str]:
        """The experts that the checkpoint holds."""
        return [expert.name for expert in self.variant.trained_experts(self.manifest.expert)]

    @property
    def is_full(self) -> bool:
        return self.layout == "original"

    def stem(self, expert: str) -> str:
        """`<variant>[_high_noise]-step<N>[-ema]-lora[-<layout>]`, or `-merged`; `both` names the pair."""
        pair = "" if expert in ("default", BOTH) else f"_{expert}_noise"
        kind = {(True, True): "-merged", (True, False): "", (False, False): "-lora"}[self.is_full, self.merge]
        layout = "" if self.layout in ("original", "diffsynth") else f"-{self.layout}"
        return f"{self.manifest.variant}{pair}-step{self.manifest.step}{'-ema' * self.ema}{kind}{layout}"


def plan_export(checkpoint: Path, layout: str | None, dtype: torch.dtype | None, merge: bool, ema: bool) -> Export:
    manifest = read_manifest(checkpoint)
    if merge and manifest.method != "lora":
        raise ValueError(f"--merge adds a LoRA to its base, {checkpoint} holds full weights already: leave it out")
    layouts = LAYOUTS["full" if merge else manifest.method]
    if (layout or layouts[0]) not in layouts:
        hint = "; with --merge a LoRA becomes full weights" if layout == "original" else ""
        kind = "merged" if merge else manifest.method
        raise ValueError(f"layout {layout!r} does not fit a {kind} checkpoint: use {', '.join(layouts)}{hint}")
    place = next((folder for folder in (checkpoint, checkpoint.parent) if (folder / "recipe.yaml").is_file()), None)
    if place is None:  # WanTrainer used as a library: it knows of no recipe
        logger.warning("%s has no recipe.yaml: its base is taken as it is, with no LoRA fused into it", checkpoint)
    content = (place / "recipe.yaml").read_bytes() if place is not None else None
    return Export(
        checkpoint=checkpoint,
        manifest=manifest,
        recipe=None if place is None else load_recipe(str(place / "recipe.yaml")),
        recipe_hash="" if content is None else hashlib.sha256(content).hexdigest()[:16],
        layout=layout or layouts[0],
        dtype=dtype,
        merge=merge,
        ema=ema,
    )


def default_output(job: Export) -> Path:
    """`<run>/export/<name>`, a folder."""
    return job.checkpoint.parent / "export" / job.stem(job.manifest.expert)


def metadata(job: Export, expert: str) -> dict[str, str]:
    """What an exported file says of itself."""
    manifest = job.manifest
    fields = {
        "format": "pt",
        "variant": manifest.variant,
        "expert": expert,
        "base": shown_name(manifest.base),
        "method": "lora merged into the base" if job.merge else manifest.method,
        "step": str(manifest.step),
        "ema": str(job.ema).lower(),
        "recipe": job.recipe_hash,
        "made_by": "wan-accel",
    }
    if manifest.lora is not None:
        fields |= {"rank": str(manifest.lora["r"]), "alpha": str(manifest.lora["lora_alpha"])}
    return fields


def shown_name(path: str) -> str:
    """A hub id as it is; of a local path the last part only, since exports are published."""
    return path if is_hub_id(path) else Path(path).name
