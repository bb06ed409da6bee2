"""Cross rules, on every shipped recipe and on layouts that do not fit."""

import json
from pathlib import Path

import pytest

from wan_accel.recipe.check import check, read_engine
from wan_accel.recipe.load import RecipeError, load_recipe, shipped_recipes

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
ENGINES = {
    "ddp": "ddp", "fsdp2": "fsdp2", "hsdp": "hsdp", "zero3": "zero3", "cpu_ddp": "ddp", "cpu_fsdp2": "fsdp2",
    "cpu_zero3": "zero3", "cpu_zero2": "zero2", "zero2": "zero2", "zero2_offload": "zero2", "zero3_offload": "zero3",
    "fsdp2_offload": "fsdp2",
}  # fmt: skip


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_sound(name: str) -> None:
    recipe = load_recipe(name)
    processes = recipe.parallel.ulysses * (1 if name.startswith("demo/") else 2)
    assert check(recipe, world_size=processes) == []


def test_every_shipped_engine_is_read() -> None:
    files = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert {name: read_engine(path) for name, path in files.items()} == ENGINES


def test_all_problems_at_once() -> None:
    recipe = load_recipe(
        "t2v-a14b/full",
        ["parallel.ulysses=3", "model.expert=null", "model.torch_dtype=bfloat16", "data.face_dropout=0.1",
         "data.latents=s3://bucket/latents", "model.checkpoint=/nowhere"],
    )  # fmt: skip
    problems = check(recipe, world_size=8)
    for expected in (
        "model.expert is missing: t2v-a14b has high and low",
        "data.face_dropout=0.1: t2v-a14b has no face input",
        "parallel.ulysses=3 does not divide num_heads=40 (t2v-a14b): use 1, 2, 4, 5, 8, 10",
        "parallel.ulysses=3 does not divide the 8 processes",
        "data.latents=s3://bucket/latents is remote",
        "model.torch_dtype=bfloat16 with method.kind=full",
    ):
        assert any(expected in problem for problem in problems), expected
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("file", "key"), [("high_noise_model/config.json", "num_heads"), ("transformer/config.json", "num_attention_heads")]
)
def test_heads_are_those_of_a_checkpoint_that_is_there(file: str, key: str, tmp_path: Path) -> None:
    recipe = load_recipe("t2v-a14b/lora", ["parallel.ulysses=3", f"model.checkpoint={tmp_path}"])
    assert not any("heads" in problem for problem in check(recipe))  # nothing says how many
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(json.dumps({key: 8}))
    assert "parallel.ulysses=3 does not divide num_heads=8 (t2v-a14b): use 1, 2, 4, 8" in check(recipe)


def test_batch_and_variants() -> None:
    recipe = load_recipe("animate-14b/lora", ["data.global_batch.samples=6"])
    assert check(recipe, world_size=16) == [
        "data.global_batch.samples=6 is not a multiple of the 4 data ranks (16 processes / ulysses 4): some would idle "
        "in every step; use 8"
    ]
    assert check(load_recipe("animate-14b/lora", ["variant=animate"]))[0].startswith("variant 'animate' is not known")
    assert check(load_recipe("i2v-a14b/lora", ["data.image_dropout=0.1"])) == [
        "data.image_dropout=0.1: i2v-a14b is not trained with and without a first frame; remove the key (ti2v-5b is)"
    ]


def test_batches_of_tokens() -> None:
    tokens = ["data.global_batch={tokens: 300000, multiple_of: 4}", "data.micro_batch={tokens: 40000}"]
    assert check(load_recipe("t2v-1.3b/lora", tokens), world_size=4) == []
    assert check(load_recipe("t2v-1.3b/lora", tokens), world_size=8) == [
        "data.global_batch.multiple_of=4 is not a multiple of the 8 data ranks (8 processes / ulysses 1): some would "
        "idle in every step; use 8"
    ]
    wrong = ["data.global_batch={}", "data.micro_batch={samples: 1, tokens: 5, multiple_of: 2}"]
    assert [problem.split(":")[0] for problem in check(load_recipe("t2v-1.3b/lora", wrong))] == [
        "data.global_batch needs samples or tokens, one of them",
        "data.micro_batch needs samples or tokens, one of them",
        "data.micro_batch.multiple_of has an effect only in data.global_batch with tokens",
    ]


def test_objective_keys_without_effect() -> None:
    recipe = load_recipe("t2v-1.3b/lora", ["objective={preset: diffsynth, shift: 3.0}"])
    assert check(recipe) == ["objective.shift has no effect with preset=diffsynth: remove one of them"]
    recipe = load_recipe("t2v-1.3b/lora", ["objective={density: mode, logit_std: 2.0}"])
    assert check(recipe) == [
        "objective.logit_std has no effect with density=mode: remove it, or set density: logit_normal"
    ]
    assert check(load_recipe("t2v-1.3b/lora", ["objective={density: logit_normal, logit_mean: 0.5}"])) == []


def test_videos() -> None:
    given = ["validation.sample={num_steps: 1, ground_truth: clips}", "model.expert=low", "data.clips=null"]
    assert check(load_recipe("t2v-a14b/lora", [*given, "validation.every_steps=0"])) == [
        "validation.sample without validation.every_steps: set it, e.g. to 250",
        "validation.sample.ground_truth=clips needs data.clips: set it, or use latents",
        "validation.sample.num_steps=1 has no step for the low expert at shift 12: use more",
    ]
    assert check(load_recipe("t2v-a14b/lora", ["validation.sample={num_clips: 2, guidance: 4.0}"])) == []
    with pytest.raises(RecipeError, match=r"validation\.sample\.num_step: unknown key \(did you mean num_steps\?\)"):
        load_recipe("t2v-a14b/lora", ["validation.sample={num_step: 2}"])


def test_engines_that_are_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}\n")
    with pytest.raises(ValueError, match="zero_stage=1 is not supported: use 2 or 3"):
        read_engine(path)
    path.write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n")
    with pytest.raises(ValueError, match="only fsdp_version: 2"):
        read_engine(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_engine(tmp_path / "none.yaml")


def test_what_needs_compiled_blocks() -> None:
    recipe = load_recipe("t2v-1.3b/lora", ["memory={activation_checkpointing: 0.5, compile: false, fp8: true}"])
    assert check(recipe) == [
        "memory.activation_checkpointing=0.5 needs memory.compile: true: it is the compiler that keeps to a budget; "
        "use attention, full or none without it",
        "memory.fp8=True needs memory.compile: true: casts that are not fused cost more than 8 bits save",
    ]
    recipe = load_recipe("t2v-1.3b/lora", ["memory={activation_checkpointing: 0.5, compile: true, fp8: true}"])
    assert check(recipe) == []
    assert check(recipe, engine="zero3") == [
        "memory.compile: true does not work under ZeRO-3, which gathers parameters inside the blocks: use FSDP2 "
        "(fsdp2.yaml), or set memory.compile: false"
    ]


@pytest.mark.parametrize("value", ["1.5", "0", "some", "true"])
def test_checkpointing_is_a_policy_or_a_budget(value: str) -> None:
    with pytest.raises(RecipeError, match=r"memory\.activation_checkpointing"):
        load_recipe("t2v-1.3b/lora", [f"memory.activation_checkpointing={value}"])
