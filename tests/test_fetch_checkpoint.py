"""`wan-accel download` and `export --push-to-hub`, against a hub on this machine."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import tiny_state, write_checkpoint
from exports import lora_tensors, write_run

sys.path.insert(0, str(Path(__file__).parent / "preprocessing"))  # the hub is shared with the tests there

from hub_state import Hub
from local_hub import hub_of_this_process

from wan_accel.cli import main
from wan_accel.download import download, needed_files
from wan_accel.hub import HubError
from wan_accel.models.hub import is_hub_id, resolve_checkpoint
from wan_accel.models.loading import load_wan
from wan_accel.models.variants import get_variant
from wan_accel.recipe.schema import Data, Method, Model, Recipe
from wan_accel.tiny import init_tiny

REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
NOT_NEEDED = {"assets/logo.png": b"x", "README.md": b"x", "xlm-roberta-large/tokenizer.json": b"{}"}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("released") / "model"
    init_tiny("t2v-1.3b", folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(released: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_of_this_process() as hub:
        hub.add("models", REPOSITORY, released | NOT_NEEDED)
        yield hub


def recipe(checkpoint: str | Path, revision: str | None = None) -> Recipe:
    model = Model(checkpoint=str(checkpoint), revision=revision)
    return Recipe(variant="t2v-1.3b", model=model, method=Method(kind="lora"), data=Data(latents="x"))


def test_a_local_folder_gets_exactly_what_is_needed(hub: Hub, released: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "Wan2.1-T2V-1.3B"
    assert download(recipe(folder)) == folder
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: data for name, data in there.items() if not name.startswith(".cache")} == released
    load_wan("t2v-1.3b", folder)
    hub.requests.clear()
    download(recipe(folder))
    assert not hub.asked("GET", "/resolve/")  # nothing is fetched again


def test_a_hub_id_is_found_in_the_cache_afterwards(hub: Hub, tmp_path: Path) -> None:
    other = hub.add("models", "me/tuned", hub.repositories["models", REPOSITORY].commits[
        hub.repositories["models", REPOSITORY].branches["main"]
    ])  # fmt: skip
    with pytest.raises(ValueError, match="fetch it with `wan-accel download RECIPE`"):
        resolve_checkpoint("me/tuned")
    folder = download(recipe("me/tuned"))
    assert folder.is_relative_to(tmp_path / "cache")
    assert resolve_checkpoint("me/tuned") == folder
    load_wan("t2v-1.3b", folder)
    assert download(recipe("me/tuned", revision=other)) == folder == resolve_checkpoint("me/tuned", other)


def test_the_command(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "elsewhere"
    assert main(["download", "t2v-1.3b/lora", "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip().endswith(str(out))
    assert main(["download", "t2v-1.3b/lora", "model.checkpoint=me/nothing"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: me/nothing at http://127.0.0.1") and "Repository" in message


def test_a_file_that_is_missing_is_not_made_a_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.safetensors", "weights/x.safetensors"):
        assert not is_hub_id(name)
        with pytest.raises(ValueError, match=rf"model\.checkpoint={name} names a file, .*: give a folder or a hub id"):
            download(recipe(name))
    assert main(["download", "t2v-1.3b/lora", "--output", "x.safetensors"]) == 2
    assert capsys.readouterr().err.startswith("error: --output=x.safetensors names a file")
    assert not hub.requests and not list(tmp_path.iterdir())
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file that is there: nothing is to be fetched"):
        download(recipe("x.safetensors"))


def test_files_that_are_missing_or_damaged_are_named(
    hub: Hub, released: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = {name: data for name, data in released.items() if not name.endswith((".pth", "tokenizer.json"))}
    hub.add("models", "me/less", less)
    with pytest.raises(HubError, match=r"me/less has no .*VAE\.pth.*: it is not a whole checkpoint of t2v-1\.3b"):
        download(recipe("me/less"))
    cut = {name: data[:-100] if name.endswith("2-of-00002.safetensors") else data for name, data in released.items()}
    hub.add("models", "me/cut", cut)
    with pytest.raises(ValueError, match="is damaged or cut short"):
        download(recipe("me/cut"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be fetched .*HF_ENDPOINT names another hub"):
        download(recipe("me/tuned"))


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_only_what_is_missing_counts(
    hub: Hub, released: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    asked = recipe(REPOSITORY if place == "cache" else tmp_path / "x")
    folder = download(asked)
    whole, lost = sum(map(len, released.values())), max(released, key=lambda name: len(released[name]))
    (folder / lost).resolve().unlink()
    (folder / lost).unlink(missing_ok=True)  # a link into the cache
    usage = type(shutil.disk_usage(tmp_path))(10**9, 0, len(released[lost]))
    monkeypatch.setattr("wan_accel.disk.shutil.disk_usage", lambda path: usage)
    with caplog.at_level("INFO"):
        download(asked)
    needed = f"1 of {len(released)} files are to be fetched, {len(released[lost]) / 1e9:.2f} of {whole / 1e9:.2f} GB"
    assert needed in caplog.text
    assert (folder / lost).read_bytes() == released[lost]


def test_a_full_disk_is_seen_before(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"GB are to be fetched, 0\.00 GB are free"):
        download(recipe(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


ORIGINAL_A14B = [
    *(f"{folder}/{name}" for folder in ("high_noise_model", "low_noise_model")
      for name in ("config.json", "diffusion_pytorch_model-00001-of-00006.safetensors",
                   "diffusion_pytorch_model.safetensors.index.json")),
    "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/spiece.model", "configuration.json", "assets/moe_2.png", "README.md",
]  # fmt: skip
DIFFUSERS_A14B = [
    *(f"{folder}/diffusion_pytorch_model-00001-of-00012.safetensors" for folder in ("transformer", "transformer_2")),
    "vae/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/model-00001-of-00005.safetensors",
    "tokenizer/tokenizer.json", "tokenizer/spiece.model", "model_index.json", "scheduler/scheduler_config.json",
]  # fmt: skip


@pytest.mark.parametrize("names", [ORIGINAL_A14B, DIFFUSERS_A14B])
@pytest.mark.parametrize("expert", ["high", "low", "both"])
def test_only_the_experts_that_are_trained_are_fetched(names: list[str], expert: str) -> None:
    variant = get_variant("t2v-a14b")
    files = needed_files(names, variant, variant.trained_experts(expert), "x/y")
    high = any(name.startswith(("high_noise_model/", "transformer/")) for name in files)
    low = any(name.startswith(("low_noise_model/", "transformer_2/")) for name in files)
    assert (high, low) == {"high": (True, False), "low": (False, True), "both": (True, True)}[expert]
    unneeded = ("README.md", "assets", "configuration.json", "model_index", "scheduler")
    assert not any(name.startswith(unneeded) for name in files)
    assert len(files) == len(names) - sum(name.startswith(unneeded) for name in names) - (expert != "both") * sum(
        name.startswith(("high_noise_model/", "transformer/")) for name in names
    )


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("Wan-AI/Wan2.2-T2V-A14B") and is_hub_id("me/x.y-z_1")
    for local in ("checkpoints/Wan2.2-T2V-A14B", "./me/x", "/me/x", "weights", "a/b/c", "../me/x"):
        assert not is_hub_id(local), local
    (tmp_path / "me").mkdir()
    assert not is_hub_id("me/x")


def test_an_export_is_pushed_with_its_card(hub: Hub, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "t2v-1.3b")
    run = write_run(tmp_path / "run", base, "t2v-1.3b", lora_tensors(tiny_state("t2v-1.3b"), ["blocks.0.ffn.0"]))
    out = tmp_path / "x.safetensors"
    assert main(["export", str(run), "--output", str(out), "--push-to-hub", "me/lora"]) == 0
    repository = hub.repositories["models", "me/lora"]
    files = repository.commits[repository.branches["main"]]
    assert files["x.safetensors"] == out.read_bytes()
    assert files["README.md"] == out.with_suffix(".md").read_bytes()
    assert main(["export", str(run), "--layout", "peft", "--push-to-hub", "me/folder"]) == 0
    repository = hub.repositories["models", "me/folder"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= repository.commits[
        repository.branches["main"]
    ].keys()


def test_an_upload_that_fails_is_tried_again_without_another_export(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base, out = write_checkpoint(tmp_path / "base", "t2v-1.3b"), tmp_path / "x"
    run = write_run(tmp_path / "run", base, "t2v-1.3b", lora_tensors(tiny_state("t2v-1.3b"), ["blocks.0.ffn.0"]))
    exporting = ["export", str(run), "--output", str(out), "--private"]
    for name, reason in ({"me/": "'me/' is no name of a repository", "lora": "give OWNER/NAME"}).items():
        assert main([*exporting, "--push-to-hub", name]) == 2
        assert reason in capsys.readouterr().err and not out.exists()
    assert main(exporting) == 2
    assert "--private is of the repository that --push-to-hub names" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*exporting, "--push-to-hub", "me/lora"]) == 2
    message, _, again = capsys.readouterr().err.strip().partition(". To try again: wan-accel ")
    assert "x is written, but me/lora at" in message
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(again.split()) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/me/lora"
    repository = hub.repositories["models", "me/lora"]
    assert repository.private
    files = repository.commits[repository.branches["main"]]
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: files[name] for name in written} == written
    hub.requests.clear()
    assert main(again.split()) == 0
    assert not hub.asked("PUT", "/objects/")  # nothing is sent again


def test_what_cannot_be_pushed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (tmp_path, tmp_path / "x.safetensors"):
        assert main(["push", str(path), "me/x"]) == 2
        assert f"{path} is no export" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("an export")
    hub.add("models", "me/public", {})
    assert main(["push", str(tmp_path), "me/public", "--private"]) == 2
    assert "me/public is there already and public" in capsys.readouterr().err
    hub.token = "hf_other"
    assert main(["push", str(tmp_path), "me/x"]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith(f"error: me/x at {hub.url} cannot be pushed to (") and "401" in message
