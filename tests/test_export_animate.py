"""An Animate LoRA that reaches the face adapter, in the tools that load it."""

from pathlib import Path

import pytest
import torch
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffusers import WanAnimateTransformer3DModel
from diffusers_wan import animate_inputs, diffusers_output, load_into, save_repository
from exports import TOLERANCE, lora_tensors, modules, with_lora, write_run
from models.test_variant_parity import diffsynth_velocity
from torch import Tensor

from wan_accel.export import export
from wan_accel.models.dit import animate_size_from_shapes, build_animate_adapter, build_dit, dit_size_from_shapes
from wan_accel.models.reader import CheckpointReader

Trained = tuple[Path, WanAnimateTransformer3DModel, Tensor]


@pytest.fixture(scope="module")
def animate(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of an Animate run with LoRA on its face adapter too, its base, and what the trained model says."""
    folder = tmp_path_factory.mktemp("animate")
    transformer = save_repository(folder / "model", "animate-14b")["default"]
    faces = [f"face_adapter.fuser_blocks.0.{layer}" for layer in ("linear1_kv", "linear1_q", "linear2")]
    tensors = lora_tensors(weights_of(folder / "model" / "transformer"), [*modules(5), *faces])
    write_run(folder / "run", folder / "model", "animate-14b", tensors)
    with torch.no_grad():
        return folder, transformer, with_lora("animate-14b", folder / "model", tensors, motion=True)(**animate_inputs())


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(checkpoint)
    return {name: reader.read(name) for name in reader.shapes}


def test_animate_with_the_face_adapter(animate: Trained, tmp_path: Path) -> None:
    folder, transformer, expected = animate
    load_into(transformer, export(folder / "run", layout="diffusers", output=tmp_path / "x.safetensors"))
    torch.testing.assert_close(diffusers_output(transformer, animate_inputs()), expected, **TOLERANCE)


def animate_pipeline(checkpoint: Path) -> WanVideoPipeline:
    """diffsynth's pipeline, whose DiT and Animate adapter are two models that share a checkpoint's tensors."""
    weights = weights_of(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    pipe = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
    pipe.dit = build_dit(dit_size_from_shapes(shapes, num_heads=8))
    pipe.animate_adapter = build_animate_adapter(animate_size_from_shapes(shapes))
    for model in (pipe.dit, pipe.animate_adapter):
        own = {name: weights.pop(name) for name in model.state_dict() if not name.endswith(".kernel")}  # blurs
        model.load_state_dict(own, strict=False)
    assert not weights
    return pipe


def pipeline_output(pipe: WanVideoPipeline) -> Tensor:
    with torch.no_grad():
        return diffsynth_velocity(pipe.dit, pipe.animate_adapter, **animate_inputs())


def test_diffsynth_loads_the_face_adapter_as_the_card_says(
    animate: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, expected = animate
    export(folder / "run", layout="diffsynth", output=tmp_path / "x.safetensors")
    pipe = animate_pipeline(folder / "model" / "transformer")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "x.md").read_text()
    assert "each line loads its own model's layers and passes over the other's, so run both" in card
    lines = card.partition("```python\n")[2].partition("\n```")[0].splitlines()
    assert len(lines) == 2
    outputs = []
    for line in lines:
        exec(line, {"pipe": pipe})
        outputs.append(pipeline_output(pipe))
    assert not torch.allclose(outputs[0], expected, **TOLERANCE)  # the first line alone leaves the face adapter's out
    torch.testing.assert_close(outputs[1], expected, **TOLERANCE)
