"""Downloads from a hub on this machine that serves the demo's small networks in place of the released ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from hub_state import Hub
from local_hub import hub_of_this_process

from preprocessing import download as download_module
from preprocessing.cli import main
from preprocessing.download import check, download
from preprocessing.onnx_model import OnnxModel
from preprocessing.released_models import RELEASED, REPOSITORY, find_models
from wan_accel.hub import HubError

DEMO = Path(__file__).parents[2] / "demo"
POSE = RELEASED["pose"].path
DETECTOR = RELEASED["detector"].path


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, bytes]:
    """The repository's files: as the released ones are laid out, the pose network in a folder with its weights."""
    folder = tmp_path_factory.mktemp("networks")
    model = onnx.load(str(DEMO / "models/wholebody133.onnx"))
    onnx.save_model(model, str(folder / "end2end.onnx"), save_as_external_data=True, location="all.weight")
    files = {f"{POSE}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    files[DETECTOR] = (DEMO / "models/person_detector.onnx").read_bytes()
    files[RELEASED["segmenter"].path] = (DEMO / "models/person_segmenter.onnx").read_bytes()
    return {**files, "README.md": b"not a network", "diffusion_pytorch_model.safetensors": b"not wanted either"}


@pytest.fixture
def hub(networks):
    with hub_of_this_process() as hub:
        hub.add("models", REPOSITORY, dict(networks))
        yield hub


def whole_files(folder: Path) -> dict[str, bytes]:
    inside = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in inside if path.name != "models.json"}


def test_the_networks_arrive_whole_and_are_recorded(hub: Hub, networks, tmp_path):
    download(tmp_path / "models")
    wanted = {path: data for path, data in networks.items() if path.startswith("process_checkpoint/")}
    assert whole_files(tmp_path / "models") == wanted
    record = json.loads((tmp_path / "models/models.json").read_text())
    commit = hub.repositories["models", REPOSITORY].branches["main"]
    assert record["repository"] == REPOSITORY and record["files"].keys() == wanted.keys()
    assert {entry["revision"] for entry in record["files"].values()} == {commit}
    assert check(tmp_path / "models") == []


def test_again_is_checked_without_the_hub_and_damage_is_fetched_again(hub: Hub, networks, tmp_path):
    download(tmp_path, ["detector"])
    num_requests = len(hub.requests)
    download(tmp_path, ["detector"])
    assert len(hub.requests) == num_requests
    (tmp_path / DETECTOR).write_bytes(networks[DETECTOR][:-1] + b"?")
    assert check(tmp_path) == [f"{tmp_path / DETECTOR}: its content is not what was downloaded"]
    download(tmp_path, ["detector"])
    assert (tmp_path / DETECTOR).read_bytes() == networks[DETECTOR]


def test_one_network_then_another_shares_the_record(hub: Hub, tmp_path):
    download(tmp_path, ["detector"])
    download(tmp_path, ["segmenter"])
    assert len(json.loads((tmp_path / "models.json").read_text())["files"]) == 2
    assert not (tmp_path / POSE).exists()


def test_a_wrong_hash_is_an_error_and_the_file_is_removed(hub: Hub, tmp_path):
    hub.corrupt.add(DETECTOR)
    expected = r"yolov10m.onnx came with another hash than the hub says \(dd57c2e9b41a\w+\) and was removed"
    with pytest.raises(HubError, match=expected):
        download(tmp_path, ["detector", "segmenter"])
    assert not (tmp_path / DETECTOR).exists()
    assert list(json.loads((tmp_path / "models.json").read_text())["files"]) == [RELEASED["segmenter"].path]
    hub.corrupt.clear()
    download(tmp_path, ["detector", "segmenter"])
    assert check(tmp_path) == []


def test_files_that_git_holds_are_checked_by_gits_hash(hub: Hub, networks, tmp_path):
    text = f"{POSE}/labels.txt"
    hub.add("models", REPOSITORY, {**networks, text: b"nose, eyes"})
    hub.corrupt.add(text)
    with pytest.raises(HubError, match=r"labels.txt came with another hash than the hub says"):
        download(tmp_path, ["pose"])
    hub.corrupt.clear()
    download(tmp_path, ["pose"])
    assert (tmp_path / text).read_bytes() == b"nose, eyes"


def test_a_dropped_connection_goes_on_where_it_broke(hub: Hub, networks, tmp_path):
    weights = f"{POSE}/all.weight"
    hub.drops[weights] = 15_000_000
    download(tmp_path, ["pose"])
    assert (tmp_path / weights).read_bytes() == networks[weights]
    first, second = [headers.get("Range") for headers in hub.asked("GET", "all.weight")]
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) > 1_000_000


def commit_of(hub: Hub) -> str:
    return hub.repositories["models", REPOSITORY].branches["main"]


def test_whole_files_survive_an_interruption(hub: Hub, networks, tmp_path, monkeypatch):
    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download_module, "write_record", kill)
        with pytest.raises(KeyboardInterrupt):
            download(tmp_path, ["detector", "pose"])
    (tmp_path / POSE / "all.weight").unlink()
    hub.requests.clear()
    download(tmp_path, ["detector", "pose"])
    assert not hub.asked("GET", f"resolve/{commit_of(hub)}/{DETECTOR}")
    assert len(hub.asked("GET", "all.weight")) == 1
    assert check(tmp_path) == []


def test_files_put_there_by_hand_are_not_fetched_again(hub: Hub, networks, tmp_path):
    (tmp_path / DETECTOR).parent.mkdir(parents=True)
    (tmp_path / DETECTOR).write_bytes(networks[DETECTOR])
    download(tmp_path, ["detector"])
    assert not hub.asked("GET", f"resolve/{commit_of(hub)}/{DETECTOR}")
    assert check(tmp_path) == []


def test_a_revision_is_asked_for_and_an_unknown_one_refused(hub: Hub, networks, tmp_path):
    older = commit_of(hub)
    hub.add("models", REPOSITORY, {**networks, DETECTOR: b"a newer network"})
    download(tmp_path, ["detector"], revision=older)
    assert (tmp_path / DETECTOR).read_bytes() == networks[DETECTOR]
    download(tmp_path, ["detector"], revision="main")
    assert (tmp_path / DETECTOR).read_bytes() == b"a newer network"
    with pytest.raises(HubError, match=r"cannot be fetched .*Revision Not Found"):
        download(tmp_path, ["detector"], revision="nowhere")


def test_a_repository_without_the_files_is_refused(hub: Hub, networks, tmp_path):
    hub.add("models", REPOSITORY, {"README.md": b"moved"})
    with pytest.raises(HubError, match=r"at revision main has no process_checkpoint/det/yolov10m.onnx"):
        download(tmp_path, ["detector"])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before(hub: Hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0\.01 GB are to be fetched, 0\.00 GB are free: free some"):
        download(tmp_path / "new/folder", ["detector"])
    assert not (tmp_path / "new").exists()


def test_offline_says_which_file_to_put_where(hub: Hub, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["download", "--output", str(tmp_path / "models")]) == 2
    error = capsys.readouterr().err
    for name, released in RELEASED.items():
        kind = "tree" if name == "pose" else "resolve"
        assert f"{name}: {hub.url}/{REPOSITORY}/{kind}/main/{released.path}" in error
        assert f"to {tmp_path / 'models' / released.path}" in error
    assert "offline" in error and f"give `--models {tmp_path / 'models'}`" in error
    assert not (tmp_path / "models").exists()


def test_a_hub_that_is_not_there_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"at http://127.0.0.1:9 cannot be fetched \(.*refused"):
        download(tmp_path, ["detector"])


def test_the_command_asks_the_hub_of_the_environment_with_its_token(hub: Hub, tmp_path):
    """In a process of its own, as huggingface_hub reads the environment once."""
    hub.token = "hf_secret"
    command = [sys.executable, "-m", "preprocessing.cli", "download", "--output", str(tmp_path), "--what", "detector"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_wrong"}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "HF_TOKEN says who asks" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = subprocess.run(command, env={**environment, "HF_TOKEN": hub.token}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / DETECTOR}\n"), done.stderr


def test_check_names_what_changed(hub: Hub, tmp_path, capsys):
    assert main(["download", "--output", str(tmp_path), "--what", "detector,segmenter"]) == 0
    assert main(["download", "--output", str(tmp_path), "--check"]) == 0
    (tmp_path / DETECTOR).unlink()
    with (tmp_path / RELEASED["segmenter"].path).open("ab") as file:
        file.write(b"!")
    capsys.readouterr()
    assert main(["download", "--output", str(tmp_path), "--check"]) == 2
    missing, longer = capsys.readouterr().err.splitlines()
    assert missing == f"error: {tmp_path / DETECTOR}: missing"
    assert longer.endswith("449563 bytes, 449562 were downloaded")
    with pytest.raises(ValueError, match=r"has no models\.json"):
        check(tmp_path / "elsewhere")


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "models.json").write_text('{"files": 3}')
    with pytest.raises(ValueError, match=r"models\.json is damaged .*: remove it and run `wan-preprocess download`"):
        download(tmp_path)


@pytest.mark.parametrize("root", ["", "process_checkpoint"])
def test_the_models_folder_is_found_with_and_without_its_root(hub: Hub, tmp_path, root):
    download(tmp_path)
    found = find_models(tmp_path / root)
    assert found.keys() == RELEASED.keys()
    assert OnnxModel(found["pose"]).input_shape[1:] == (3, 256, 192)
    assert OnnxModel(found["pose"]).path.name == "end2end.onnx"
    assert found["detector"] == tmp_path / DETECTOR


def test_animate_takes_its_networks_from_the_models_folder(hub: Hub, tmp_path, capsys):
    download(tmp_path / "models", ["detector", "pose"])
    small = ["--num-frames=5", "--fps=2", "--resolution-area=160x288", "--max-clips=1", "--num-threads=2"]
    animate = ["animate", str(DEMO / "videos/walker.mp4"), *small, f"--models={tmp_path / 'models'}"]
    assert main([*animate, f"--output={tmp_path / 'none'}"]) == 2
    expected = f"--segmenter: give the network's file, or {tmp_path / 'models' / RELEASED['segmenter'].path}"
    assert expected in capsys.readouterr().err
    chosen = ["--segmenter", str(DEMO / "models/person_segmenter.onnx")]
    assert main([*animate, *chosen, f"--output={tmp_path / 'clips'}"]) == 0
    assert "1 new clips" in capsys.readouterr().out
