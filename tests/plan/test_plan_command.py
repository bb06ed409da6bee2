"""`wan-accel plan` as it is called: what it prints, what it returns, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_clips import clip_row, write_clips

from wan_accel import cache
from wan_accel.cli import main
from wan_accel.recipe.load import recipes_folder
from wan_accel.tiny import init_tiny

CONFIGS = recipes_folder() / "accelerate"
SHAPE = ["--shape", "5,64,32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    init_tiny("t2v-a14b", folder)
    return folder


def plan(*arguments: str, engine: str = "fsdp2", processes: int = 4) -> int:
    config = str(CONFIGS / f"{engine}.yaml")
    return main(["plan", *arguments, "--config_file", config, "--num_processes", str(processes)])


def tiny(checkpoint: Path, *more: str) -> list[str]:
    """A recipe of the tiny pair: 8 heads, so that degrees are not the released ones."""
    overrides = [f"model.checkpoint={checkpoint}", "memory.compile=false", "data.global_batch.samples=8"]
    return ["t2v-a14b/lora_pair", *SHAPE, *overrides, *more]


def test_what_fits(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert plan(*tiny(checkpoint), "--gpu", "H100", "--gpu_memory", "1GiB") == 0
    out = capsys.readouterr().out
    for line in (
        "t2v-a14b/lora_pair: fsdp2, 4 GPUs, ulysses 4, bf16 over fp32",
        "1 x 5 frames of 64x32 (16 tokens) at once, 8 times a step of 8 samples",
        "not verified on a GPU",
        "all-to-all      dp_shard, 4 ranks",
        "predicted from data sheets",
    ):
        assert line in out, line
    assert out.splitlines()[-1].startswith("fits: peak 0.0 of 1.0 GiB (reserve 6%)")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp", "zero3"])
def test_every_engine_as_json(engine: str, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    machines = 2 if engine == "hsdp" else 1
    arguments = tiny(checkpoint, "parallel.ulysses=2", "--json", "--gpu", "H100", "--num_machines", str(machines))
    assert plan(*arguments, engine=engine, processes=4 * machines) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and not found["verified"] and found["gpu_memory"] == 80 * 2**30
    assert found["method"] == ("simulated" if engine in ("fsdp2", "hsdp") else "formula")
    assert found["layout"]["engine"] == engine and found["num_experts"] == 2
    assert found["peak"]["total"] > found["after_a_step"]["parameters"] > 0
    assert {one["kind"] for one in found["collectives"]} >= {"all-to-all"}
    (time,) = found["predicted"]
    assert time["gpu"] == "H100" and 0 < time["mfu"] < 1 and time["seconds"] > 0
    assert found["disk"]["checkpoint"] == 12 * 2 * found["trained"]
    assert found["nearest"] == []


@pytest.mark.parametrize(
    "options",
    [
        ["training.optim=adamw_torch_8bit"],
        ["memory.compile=true", "memory.fp8=true", "model.expert=high"],
        ["data.on_the_fly=[video, text]", "data.latents=latents", "data.clips=clips", "model.expert=high"],
    ],
    ids=["8-bit optimizer", "fp8", "encoders"],
)
def test_what_changes_memory(options: list[str], checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    def planned(*more: str) -> dict[str, Any]:
        assert plan(*tiny(checkpoint, "parallel.ulysses=2", *more), "--json", "--gpu", "H100") == 0
        return json.loads(capsys.readouterr().out)

    found, plain = planned(*options), planned(*(option for option in options if option.startswith("model.")))
    if "fp8" in str(options):
        assert found["predicted"][0]["compute"] < plain["predicted"][0]["compute"]
    elif "8bit" in str(options):
        assert 0 < found["after_a_step"]["optimizer"] < plain["after_a_step"]["optimizer"]
    else:
        assert plain["peak"]["encoders"] == 0 < found["peak"]["encoders"]


def test_what_does_not_fit_and_what_would(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = tiny(checkpoint, "--shape", "41,256,256", "memory.activation_checkpointing=none", "parallel.ulysses=1")
    assert plan(*arguments, "--gpu_memory", "60MiB", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["bucket"] == [41, 256, 256]
    nearest = found["nearest"]
    assert len(nearest) == 3 and all(one["fits"] for one in nearest)
    assert [one["distance"] for one in nearest] == sorted(one["distance"] for one in nearest)
    assert len(nearest[0]["changes"]) == 1  # one step away
    peaks = [one["peak"]["total"] for one in nearest]
    assert max(peaks) < found["peak"]["total"]
    # It is no guess: planned as it says, the nearest one fits.
    change = nearest[0]["changes"][0]
    assert change.startswith(("memory.", "parallel."))
    assert plan(*arguments, change, "--gpu_memory", "60MiB") == 0


def test_search_simulates_the_fastest(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = tiny(checkpoint, "--shape", "41,256,256", "parallel.ulysses=2", "--search", "--gpu", "H100", "--json")
    assert plan(*arguments, processes=2) == 0
    fastest = json.loads(capsys.readouterr().out)["fastest"]
    seconds = [one["predicted"][0]["seconds"] for one in fastest]
    assert len(fastest) == 3 and seconds == sorted(seconds)
    sharded = [one for one in fastest if one["layout"]["engine"] == "fsdp2"]
    assert sharded and all(one["method"] == "simulated" and one["fits"] for one in sharded)
    # Exchanges cost time, and there is room for whole samples on each rank.
    assert all("parallel.ulysses=1" in one["changes"] for one in fastest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t2v-a14b/lora", "--gpu_memory", "80GiB"], "data.latents=data/latents is not there"),
        (["t2v-a14b/lora", *SHAPE], "how much memory a GPU has is not given: --gpu_memory 80GiB, or --gpu H100"),
        (["t2v-a14b/lora", *SHAPE, "--gpu", "H10"], "--gpu H10 is not in the table"),
        (["t2v-a14b/lora", *SHAPE, "--gpu_memory", "80"], "give a number and a unit"),
        (["t2v-a14b/lora", "--shape", "6,64,32", "--gpu", "H100"], "6 frames; t2v-a14b takes 4n+1"),
        (["t2v-a14b/lora", "--shape", "5,60,32", "--gpu", "H100"], "60x32 pixels; t2v-a14b needs multiples of 16"),
        (["t2v-a14b/lora", "--shape", "5x64x32", "--gpu", "H100"], "give FRAMES,HEIGHT,WIDTH in pixels"),
        (
            ["t2v-a14b/lora", *SHAPE, "--gpu", "H100", "parallel.ulysses=3"],
            "parallel.ulysses=3 does not divide num_heads=40 (t2v-a14b): use 1, 2, 4, 5, 8, 10",
        ),
        (["t2v-a14b/lora", *SHAPE, "--gpu", "H100", "--reserve", "6"], "--reserve 6.0: a share of the memory"),
        (["t2v-a14b/lora", *SHAPE, "--gpu_memory", "70GiB", "--search"], "--search compares predicted times"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert plan(*arguments) == 2
    assert message in capsys.readouterr().err


def test_degrees_are_those_of_the_checkpoints_heads(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert plan(*tiny(checkpoint, "parallel.ulysses=3"), "--gpu", "H100", processes=3) == 2
    message = capsys.readouterr().err
    assert "parallel.ulysses=3 does not divide num_heads=8 (t2v-a14b): use 1, 2, 4, 8" in message


def test_shapes_come_from_the_latents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The bucket of the most tokens decides; of a budget of tokens a rank runs as many samples as fit."""
    init_tiny("t2v-1.3b", tmp_path / "model")
    sizes = ((5, (64, 32)), (5, (64, 32)), (9, (64, 64)))
    rows = [clip_row(number, num_frames=frames, hw=hw) for number, (frames, hw) in enumerate(sizes)]
    write_clips(tmp_path / "clips", rows)
    recipe = ["t2v-1.3b/lora", f"model.checkpoint={tmp_path / 'model'}", f"data.clips={tmp_path / 'clips'}",
              f"data.latents={tmp_path / 'latents'}", "memory.compile=false", "parallel.ulysses=1",
              "data.global_batch={tokens: 1000, multiple_of: 4}"]  # fmt: skip
    assert cache.main(recipe) == 0
    capsys.readouterr()

    def planned(*more: str) -> dict[str, Any]:
        assert plan(*recipe, *more, "--gpu", "H100", "--json") == 0
        return json.loads(capsys.readouterr().out)

    found = planned("data.micro_batch={samples: 1}")
    assert (found["bucket"], found["num_samples"], found["num_micro_steps"]) == ([9, 64, 64], 1, 5)
    latents = (2 * 2 * 8 * 4 + 3 * 8 * 8) * 16 * 2  # bf16; the rest are captions of 512 tokens
    assert found["disk"]["cache"] == latents + 3 * 512 * 4096 * 2
    found = planned("data.micro_batch={tokens: 200}")
    assert (found["bucket"], found["num_samples"], found["num_tokens"]) == ([5, 64, 32], 12, 16)
