"""The README.md of an export: what was trained on what, and how each tool loads it."""

from dataclasses import dataclass

import yaml

from wan_accel.models.dit import ADAPTER_PREFIXES
from wan_accel.models.variants import Variant

# Expert -> DiffSynth's name of the model in its pipeline, and diffusers' argument.
_DIFFSYNTH_MODELS = {"default": "pipe.dit", "high": "pipe.dit", "low": "pipe.dit2"}
_DIFFUSERS_ARGUMENTS = {"default": "", "high": "", "low": ", load_into_transformer_2=True"}
_COMFYUI_MODELS = {"default": "the model", "high": "the high-noise model", "low": "the low-noise model"}
_PIPELINE_TAGS = {"pose": "video-to-video", "first_frame": "image-to-video", "fused_first_frame": "image-to-video"}
_PEFT = """\
from peft import PeftModel
from wan_accel import load_wan
model = PeftModel.from_pretrained(load_wan("{variant}", "<checkpoint>"{expert}), "{folder}")"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFile:
    """A written file or folder, by its name relative to the card, "" for the card's own folder."""

    name: str
    expert: str
    modules: tuple[str, ...] = ()


def model_card(
    *,
    title: str,
    variant: Variant,
    layout: str,
    files: list[CardFile],
    metadata: dict[str, str],
    fused: list[tuple[str, float]],
    read_by: str,
) -> str:
    """Markdown with a YAML front matter that the hub understands.

    Args:
        title: heading.
        variant: of the model.
        layout: `original`, or one of the LoRA layouts.
        files: what was written.
        metadata: what the files say of themselves; shown as a table.
        fused: LoRAs (path, scale) that the base had in it while this was trained.
        read_by: the tools that loaded the export.
    """
    is_lora = layout != "original"
    tag = next((_PIPELINE_TAGS[key] for key in _PIPELINE_TAGS if key in variant.conditioning), "text-to-video")
    generation = variant.hub_id.split("/")[1].split("-")[0].lower()  # wan2.1 or wan2.2
    front = {
        "base_model": variant.hub_id,
        "base_model_relation": "adapter" if is_lora else "finetune",
        "pipeline_tag": tag,
        "tags": ["wan", generation, "wan-accel", *(["lora"] if is_lora else [])],
    }
    table = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in metadata.items() if key != "format")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {title}",
        f"{'A LoRA on' if is_lora else 'Full weights of'} {variant.hub_id}, layout `{layout}`, trained with wan-accel.",
        f"| | |\n|---|---|\n{table}\n| read back by | {read_by} |",
    ]
    if fused:
        listed = ", ".join(f"`{path}` (scale {scale:g})" for path, scale in fused)
        parts.append(f"The base had these LoRAs in it while this was trained; load them too, first: {listed}.")
    parts.append("## Loading\n\n" + "\n\n".join(_loading(layout, variant, file) for file in files))
    return "\n\n".join(parts) + "\n"


def _loading(layout: str, variant: Variant, file: CardFile) -> str:
    return _LOADERS[layout](variant, file)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _diffsynth(variant: Variant, file: CardFile) -> str:
    of_adapter = {f"{module}.".startswith(ADAPTER_PREFIXES) for module in file.modules}
    models = {False: _DIFFSYNTH_MODELS[file.expert], True: "pipe.animate_adapter"}
    lines = [f'pipe.load_lora({models[which]}, "{file.name}", alpha=1)' for which in sorted(of_adapter)]
    both = "; each line loads its own model's layers and passes over the other's, so run both" if len(lines) > 1 else ""
    return f"DiffSynth-Studio, on a `WanVideoPipeline`{both}:\n\n" + _code("\n".join(lines))


def _diffusers(variant: Variant, file: CardFile) -> str:
    call = f'pipe.load_lora_weights("<folder>", weight_name="{file.name}"{_DIFFUSERS_ARGUMENTS[file.expert]})'
    return "diffusers, on a Wan pipeline:\n\n" + _code(call)


def _comfyui(variant: Variant, file: CardFile) -> str:
    return (
        f"ComfyUI: put `{file.name}` into `ComfyUI/models/loras` and load it with LoraLoaderModelOnly on "
        f"{_COMFYUI_MODELS[file.expert]}, strength 1."
    )


def _peft(variant: Variant, file: CardFile) -> str:
    expert = "" if file.expert == "default" else f', expert="{file.expert}"'
    return "peft, on a model with the original Wan names:\n\n" + _code(
        _PEFT.format(variant=variant.name, expert=expert, folder=file.name)
    )


def _original(variant: Variant, file: CardFile) -> str:
    these = f"The folder `{file.name}` replaces that" if file.name else "These files replace the DiT's"
    return (
        f"{these} (config.json and `diffusion_pytorch_model*`) in a checkpoint of {variant.hub_id}: Wan's own code "
        "reads it, DiffSynth-Studio does "
        "(`ModelConfig(path=[...safetensors])`), and wan-accel (`model.checkpoint`)."
    )


_LOADERS = {
    "diffsynth": _diffsynth,
    "comfyui": _comfyui,
    "diffusers": _diffusers,
    "peft": _peft,
    "original": _original,
}
