import pytest
from small_runs import assert_same_rows, part_of, rejections, run_job, run_on_ray_cluster


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        part_of("walker.mp4", folder / f"walk{number}.mp4", range(20 * number, 20 * number + 20))
    (folder / "broken.mp4").write_bytes(b"no video")
    return sorted(folder.glob("*.mp4"))


def test_two_ray_actors_make_the_rows_of_a_job(videos, tmp_path):
    run_job(videos, tmp_path / "job")
    summary = run_on_ray_cluster(videos, tmp_path / "ray", workers=2)
    assert (summary.todo, summary.clips, summary.finished, summary.rejected) == (4, 3, 3, 1)
    assert_same_rows(tmp_path / "ray", tmp_path / "job")
    assert rejections(tmp_path / "ray") == rejections(tmp_path / "job")
    assert len({path.parent for path in (tmp_path / "ray").glob("parts/*/*.arrow")}) == 2
    # A job without Ray finds everything done.
    assert run_job(videos, tmp_path / "ray").todo == 0


def test_what_ray_cannot_do_is_refused(videos, tmp_path):
    with pytest.raises(ValueError, match="--timeout-seconds is not available with --ray"):
        run_on_ray_cluster(videos, tmp_path / "ray", options={"timeout_seconds": 5.0})
