"""Pushing to a hub on this machine and fetching from it; the transfer is LFS, as the local hub speaks no Xet."""

import pytest
from hub_state import Hub
from local_hub import hub_of_this_process
from same_bits import assert_same_bits
from tiny_clips import clip_row, write_clips

from preprocessing.cli import main
from preprocessing.export_parquet import export_parquet
from preprocessing.hub import fetch, push
from wan_accel.data import store
from wan_accel.data.schema import CLIPS_SCHEMA
from wan_accel.hub import HubError, HubUnreachable

NAME = "me/walks"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    with hub_of_this_process() as hub:
        yield hub


@pytest.fixture
def dataset(tmp_path):
    return write_clips(tmp_path / "clips", [clip_row(number) for number in range(3)])


@pytest.fixture
def folder(dataset, tmp_path):
    export_parquet(dataset, tmp_path / "out", shard_bytes=50_000)
    return tmp_path / "out"


def test_the_command_pushes_and_import_brings_the_same_bits(hub: Hub, dataset, tmp_path, capsys):
    export = ["export", str(dataset), "--layout=hub", f"--output={tmp_path / 'out'}", f"--repo-id={NAME}", "--private"]
    assert main(export) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/datasets/{NAME}"
    repository = hub.repositories["datasets", NAME]
    there = repository.commits[repository.branches["main"]]
    assert repository.private
    assert sorted(there) == [".gitattributes", "README.md", "data/train-00000-of-00001.parquet"]
    assert main(["import", NAME, "--from=hub", f"--output={tmp_path / 'back'}"]) == 0
    assert_same_bits(store.load(tmp_path / "back", CLIPS_SCHEMA), store.load(dataset, CLIPS_SCHEMA))


def test_pushing_again_sends_no_shard_twice(hub: Hub, folder):
    push(folder, NAME)
    assert len(hub.asked("PUT", "/objects/")) == 2
    push(folder, NAME)
    assert len(hub.asked("PUT", "/objects/")) == 2


def test_a_revision_is_a_branch_of_its_own(hub: Hub, folder, tmp_path):
    assert push(folder, NAME, revision="v2") == f"{hub.url}/datasets/{NAME}/tree/v2"
    branches = hub.repositories["datasets", NAME].branches
    assert branches.keys() == {"main", "v2"} and branches["main"] != branches["v2"]
    assert len(list(fetch(NAME, revision="v2").rglob("*.parquet"))) == 2
    with pytest.raises(HubError, match=r"cannot be fetched .*Revision Not Found"):
        fetch(NAME, revision="v3")


def test_shards_of_another_export_are_not_mixed_with_ours(hub: Hub, folder, dataset, tmp_path):
    """A new revision begins without them, so that the next version of a dataset has a place."""
    push(folder, NAME)
    export_parquet(dataset, tmp_path / "one")
    with pytest.raises(HubError, match=r"holds data/train-00000-of-00002\.parquet, which is not of this export"):
        push(tmp_path / "one", NAME)
    push(tmp_path / "one", NAME, revision="v2")
    push(tmp_path / "one", NAME, revision="v2")
    assert [path.name for path in fetch(NAME, revision="v2").rglob("*.parquet")] == ["train-00000-of-00001.parquet"]


def test_a_public_repository_is_not_taken_for_private(hub: Hub, folder):
    push(folder, NAME)
    with pytest.raises(HubError, match="me/walks is there already and public: make it private on the hub"):
        push(folder, NAME, private=True)


def test_a_hub_that_refuses_or_is_silent_is_explained(hub: Hub, folder):
    from huggingface_hub import constants

    hub.token = "hf_other"
    with pytest.raises(HubError, match=rf"me/walks at {hub.url} cannot be pushed to \(.*401.*HF_TOKEN says who asks"):
        push(folder, NAME)
    hub.token = None
    with pytest.raises(HubError, match=r"cannot be fetched .*Not Found"):
        fetch("me/nowhere")
    constants.HF_HUB_OFFLINE = True  # put back with the hub
    with pytest.raises(HubUnreachable, match=r"cannot be fetched .*HF_ENDPOINT names another hub"):
        fetch(NAME)


def test_a_repository_without_shards_is_no_dataset_of_clips(hub: Hub, tmp_path, capsys):
    hub.add("datasets", NAME, {"README.md": b"soon"})
    assert main(["import", NAME, "--from=hub", f"--output={tmp_path / 'back'}"]) == 2
    assert f"me/walks at {hub.url} holds no data/: `export --layout hub` did not" in capsys.readouterr().err


def test_layout_hub_needs_a_repository(dataset, tmp_path, capsys):
    assert main(["export", str(dataset), "--layout=hub", f"--output={tmp_path / 'out'}"]) == 2
    assert "--layout hub: give the repository, --repo-id USER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
