"""`wan-preprocess inspect`: the report, and what it may cost."""

import html
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from clip_rows import clip_row, write_dataset
from PIL import Image

from preprocessing.choice import Choice
from preprocessing.cli import main
from preprocessing.figures import FIGURES
from preprocessing.inspect import inspect
from wan_accel.data import store
from wan_accel.data.clips import load_clip
from wan_accel.data.schema import QUALITY, clips_features

EVIL = "<script>alert(1)</script> \" onload='x' {{ 7 * 7 }} & co"


class Page(HTMLParser):
    """The elements of a page, and its text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self._hidden = False
        self.feed(path.read_text())
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text += data + " "

    def all(self, tag, name):
        return [attrs.get(name) for found, attrs in self.elements if found == tag]


def figures(**changes) -> dict:
    return {**dict.fromkeys(QUALITY, 0.5), **changes}


def moved(row: dict, name: str, **changes) -> dict:
    """The same clip from another video."""
    source = {**row["source"], "path": f"{name}.mp4", "sha256": name.encode().hex().rjust(64, "0")}
    return {**row, "clip_id": name, "source": source, **changes}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six clips in two parts, two of them without hands, and what was turned down."""
    row = clip_row("x")
    first = [
        moved(row, "walk-1", quality=figures(blur=10.0, hand_score=0.1)),
        moved(row, "walk-2", quality=figures(blur=900.0, hand_score=None), caption=""),
        moved(row, "jump-1", quality=figures(blur=50.0, hand_score=0.9, track_switches=3.0)),
    ]
    second = [
        moved(row, "jump-2", quality=figures(blur=float("inf"), hand_score=float("nan"))),
        moved(row, "../evil", caption=EVIL, quality=figures(blur=30.0)),
        moved(row, "jump-3", quality=figures(blur=20.0)),
    ]
    lost = [
        {
            "path": "jump-1.mp4",
            "clip_id": f"jump-1-{i}",
            "reason": "quality.blur",
            "detail": f"blur is {i}",
            "quality": figures(blur=float(i)),
        }
        for i in range(12)
    ]
    broken = {"path": "b.mp4", "clip_id": None, "reason": "unreadable", "detail": f"b.mp4: {EVIL}"}
    outcome = {"num_clips": 3, "seconds": 1.0, "time": 0.0}
    journal = {
        "videos": [
            {**outcome, "key": "jump-1.mp4", "rejected": lost},
            {**outcome, "key": "b.mp4", "rejected": [broken]},
        ]
    }
    settings = {"quality": {"blur": {"min": 15.0, "max": None}}}
    output = tmp_path_factory.mktemp("report") / "clips"
    return write_dataset(output, first, second, settings=settings, journal=journal)


@pytest.fixture(scope="module")
def report(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "out"
    found = inspect(dataset, output, choice=Choice())
    assert (found.page, found.num_shown, found.num_clips, found.problems) == (output / "index.html", 6, 6, [])
    return output


def shown(dataset, output, **choice) -> list[str]:
    """Ids of the clips on the page, in its order."""
    page = inspect(dataset, output, choice=Choice(**choice)).page.read_text()
    titles = [card.split("<h3>")[1].split("</h3>")[0] for card in page.split("<article")[1:]]
    return [html.unescape(title) for title in titles]


def test_every_figure_has_a_meaning_and_a_bad_end():
    assert set(FIGURES) == set(QUALITY)


def test_every_clip_has_its_files_and_every_link_leads_to_one(report):
    page = Page(report / "index.html")
    links = [link for link in page.all("a", "href") if not link.startswith("#")] + page.all("img", "src")
    files = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    assert {link.replace("%20", " ") for link in links} == files - {"index.html"} and len(files) == 19
    assert "sheets/walk-1.jpg" in links and "overlays/clip%204.mp4" in links
    for path in report.rglob("*.webp"):
        with Image.open(path) as picture:
            assert max(picture.size) <= 320
    assert all(text.startswith("Middle frame of ") for text in page.all("img", "alt"))


def test_nothing_comes_from_elsewhere(report):
    page = Page(report / "index.html")
    assert not [value for name in ("src", "href") for tag, attrs in page.elements if (value := attrs.get(name))
                and ("//" in value or value.startswith("/"))]  # fmt: skip
    assert page.all("script", "src") == [None] and "stylesheet" not in page.all("link", "rel")
    assert "http" not in (report / "index.html").read_text()


def test_texts_of_the_dataset_are_shown_and_never_run(report):
    text = (report / "index.html").read_text()
    assert "<script>alert" not in text and text.count("<script") == 1
    page = Page(report / "index.html")
    assert page.text.count("<script>alert(1)</script> \" onload='x' {{ 7 * 7 }} & co") == 2  # caption, rejection
    assert not [attrs for _, attrs in page.elements if "onload" in attrs]


def test_rejections_are_counted_by_reason_with_examples(report):
    text = Page(report / "index.html").text
    assert "1 of 2 videos gave nothing or broke off, and 12 clips were not good enough" in text
    assert "quality.blur 0 12 jump-1-0: blur is 0 jump-1-3: blur is 3" in text and "unreadable 1 0 b.mp4:" in text


def test_figures_are_summed_up_over_all_clips_with_the_bounds_of_the_run(report):
    text = Page(report / "index.html").text
    assert "bounds of the run that made the clips; 2 of these clips lie outside" in text  # blur 10, and none
    assert "sharpness variance of the Laplacian; low is blurred (blur)" in text and "min 15" in text
    assert "median 30 · 5% below 12 · 5% above 730 · 1 clips without it · 2 clips (33.3%) outside the bound" in text
    assert "median 0.50 · 5% below 0.16 · 5% above 0.84 · 2 clips without it · highest bar" in text  # nan is none


def test_other_bounds_can_be_tried(dataset, tmp_path):
    (tmp_path / "try.yaml").write_text("blur: {min: 25}\ntrack_switches: {max: 1}\n")
    inspect(dataset, tmp_path / "out", choice=Choice(num_clips=1), bounds_file=tmp_path / "try.yaml")
    text = Page(tmp_path / "out/index.html").text
    # Blur 10, 20 and none; 3 switches.
    assert "bounds of try.yaml; 4 of these clips lie outside at least one" in text and "max 1" in text


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"num_clips": 2}, ["walk-1", "jump-3"]),
        ({"num_clips": 3}, ["walk-1", "jump-1", "jump-3"]),
        ({"where": "source.path contains walk"}, ["walk-1", "walk-2"]),
        ({"where": "part contains 00001 and row = 2"}, ["jump-3"]),
        ({"where": "quality.hand_score is missing"}, ["walk-2", "jump-2"]),
        ({"where": "seconds > 100"}, []),
        ({"worst": "quality.blur"}, ["walk-1", "jump-3", "../evil", "jump-1", "walk-2"]),
        ({"worst": "track_switches", "num_clips": 2}, ["jump-1", "walk-1"]),
        ({"worst": "quality.blur", "where": "clip_id contains jump", "num_clips": 1}, ["jump-3"]),
    ],
)
def test_clips_are_chosen(dataset, tmp_path, choice, expected):
    assert shown(dataset, tmp_path / "out", **choice) == expected


def test_what_makes_no_sense_writes_nothing(dataset, tmp_path, capsys):
    output = str(tmp_path / "out")
    for arguments, message in (
        (["--where", "quality.blurr < 3"], "a clip has no quality.blurr: did you mean quality.blur?"),
        (["--worst", "quality.blurr"], "--worst quality.blurr: no such figure; did you mean quality.blur?"),
        (["--worst", "caption"], "--worst caption: no such figure; "),
        (["--quality", str(tmp_path / "no.yaml")], "no.yaml: cannot be read"),
        (["--sample", "0"], "argument --sample: '0' is no count: give 1 or more"),
    ):
        try:
            code = main(["inspect", str(dataset), "--output", output, *arguments])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and message in capsys.readouterr().err
    assert not Path(output).exists()


def test_only_the_clips_that_are_shown_are_decoded(tmp_path, capsys):
    good = clip_row("good")
    damaged = {"bytes": b"no video", "path": None}
    dataset = write_dataset(tmp_path / "clips", [good, moved(good, "bad", video=damaged), moved(good, "last")])
    arguments = ["inspect", str(dataset), "--num-workers", "1", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--sample", "2"]) == 0
    assert "2 of 3 clips shown" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "error: clip bad: video cannot be decoded after 0 frames" in capsys.readouterr().err
    page = Page(tmp_path / "out/index.html")
    assert "clip bad: video cannot be decoded" in page.text and len(page.all("img", "src")) == 2


def test_rows_are_those_of_the_dataset(dataset, tmp_path):
    """Whatever part a clip lies in, its pictures are its own."""
    row = clip_row("red")
    green = {**load_of(row), "clip_id": "green"}
    data = write_dataset(tmp_path / "clips", [row, row | {"clip_id": "b"}], [row | {"clip_id": "c"}, green])
    inspect(data, tmp_path / "out", choice=Choice())
    colors = {}
    for name in ("red", "b", "c", "green"):
        with Image.open(tmp_path / f"out/thumbnails/{name}.webp") as picture:
            colors[name] = picture.convert("RGB").getpixel((60, 90))
    assert colors["green"][1] > colors["red"][1] + 60 and colors["red"] == colors["b"] == colors["c"]


def load_of(row: dict) -> dict:
    """The clip on green."""
    from preprocessing.video import encode_mp4

    frames = load_clip(row)
    green = frames.frames_rgb.copy()
    green[~frames.mask] = 20, 220, 20
    return {**row, "video": {"bytes": encode_mp4(green, 10.0)[0], "path": None}}


def test_processes_give_the_same_report(dataset, report, tmp_path):
    inspect(dataset, tmp_path / "out", choice=Choice(), num_processes=2)
    for path in report.rglob("*.*"):
        one, two = path.read_bytes(), (tmp_path / "out" / path.relative_to(report)).read_bytes()
        assert one == two, path


def test_a_run_that_turned_everything_down_has_a_report(tmp_path):
    rejected = [
        {"path": "a.mp4", "clip_id": "a-1", "reason": "quality.blur", "detail": "blur is 3", "quality": figures()}
    ]
    video = {"key": "a.mp4", "num_clips": 0, "rejected": rejected, "seconds": 1.0, "time": 0.0}
    dataset = write_dataset(tmp_path / "clips", [], journal={"videos": [video]})
    assert inspect(dataset, tmp_path / "out", choice=Choice()).num_clips == 0
    text = Page(tmp_path / "out/index.html").text
    assert "No clip is chosen." in text and "no clip has it · highest bar 1" in text and "a-1: blur is 3" in text


def test_a_row_that_lacks_what_it_should_have_spoils_no_report(tmp_path):
    bad = clip_row("bad", source=None, caption=None, quality=None, reference_source=None, modes=None)
    worse = clip_row(None, num_frames=None, width=None, fps=0.0, purpose=None)
    dataset = write_dataset(tmp_path / "clips", [clip_row("good"), bad, worse])
    found = inspect(dataset, tmp_path / "out", choice=Choice())
    assert found.num_shown == 3
    assert [problem.split(";")[0] for problem in found.problems] == [
        "clip bad: caption is null",
        "clip None: num_frames None is not 4n + 1",
    ]
    text = Page(tmp_path / "out/index.html").text
    assert "None, ?–? s, track None" in text and "no clip_id" in text and "seconds 1.8" in text


def test_clips_without_people_have_a_report(tmp_path):
    features = clips_features(animate=False)
    row = {name: value for name, value in clip_row("plain", quality=None).items() if name in features}
    dataset = write_dataset(tmp_path / "clips", [row], features=features, settings={"quality": {}})
    assert inspect(dataset, tmp_path / "out", choice=Choice()).problems == []
    text = Page(tmp_path / "out/index.html").text
    assert "No bounds were asked for." in text and "No clip has a figure." in text and "64x96 1" in text


def test_what_is_no_sound_dataset_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="is not a dataset of wan-accel"):
        inspect(tmp_path, tmp_path / "out", choice=Choice())
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    part = copy / "parts/writer0/data-00000.arrow"
    part.write_bytes(part.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is damaged"):
        inspect(copy, tmp_path / "out", choice=Choice())
    shutil.copytree(dataset, tmp_path / "latents")
    run = tmp_path / "latents" / store.RUN_FILE
    run.write_text(json.dumps({**json.loads(run.read_text()), "schema": "wan-accel/latents@1"}))
    with pytest.raises(ValueError, match="has schema 'wan-accel/latents@1', expected"):
        inspect(tmp_path / "latents", tmp_path / "out", choice=Choice())
    assert not (tmp_path / "out").exists()


def test_the_worst_of_many_are_marked(tmp_path):
    row = clip_row("x")
    rows = [moved(row, f"clip-{i:02}", quality=figures(blur=float(i), track_switches=float(i))) for i in range(40)]
    inspect(write_dataset(tmp_path / "clips", rows), tmp_path / "out", choice=Choice(num_clips=40))
    cards = (tmp_path / "out/index.html").read_text().split("<article")[1:]
    marked = {number: card.count('class="odd"') for number, card in enumerate(cards) if 'class="odd"' in card}
    assert marked == {0: 1, 1: 1, 38: 1, 39: 1}  # 5% of 40 at either figure's bad end
