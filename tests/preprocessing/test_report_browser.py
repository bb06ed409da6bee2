"""The report of a real run, in a real browser."""

import json
import os

import pytest
from browser import Browser, chromium
from PIL import Image
from small_runs import part_of, run_job

from preprocessing.choice import Choice
from preprocessing.inspect import inspect

REASON = "no chromium here: `apt-get install chromium`, or leave WAN_ACCEL_REQUIRE_BROWSER unset to go without"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Clips of two videos, some turned down, and a broken video; captions that are no markup."""
    if chromium() is None and os.environ.get("WAN_ACCEL_REQUIRE_BROWSER") == "1":
        pytest.fail(REASON)
    if chromium() is None:
        pytest.skip(REASON)
    root = tmp_path_factory.mktemp("browser")
    (root / "videos").mkdir()
    part_of("walker.mp4", root / "videos/walk & <b>bold.mp4", range(0, 60, 2))
    part_of("two_people.mp4", root / "videos/two.mp4", range(0, 30, 2))
    (root / "videos/broken.mp4").write_bytes(b"nothing")
    caption = "<script>document.title = 'taken over'</script> " + "a_very_long_word" * 20
    run_job(sorted((root / "videos").iterdir()), root / "clips", caption=caption, people="all")
    found = inspect(root / "clips", root / "report", choice=Choice(where="quality.blur > 0"))
    assert found.num_shown >= 4
    return found


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


ALL_LOADED = (
    "Promise.all([...document.images].map((i) => { i.loading = 'eager'; return i.decode(); })).then(() => true)"
)
WIDTHS = """[document.documentElement.scrollWidth, ...[...document.querySelectorAll('body *')].map(
    (e) => e.closest('.hidden') ? 0 : e.getBoundingClientRect().right)]"""
IDS = """[...document.querySelectorAll('#cards article')].filter((a) => a.checkVisibility()).map(
    (a) => a.querySelector('h3').textContent)"""
VALUES = """[...document.querySelectorAll('article')].map(
    (a) => [a.querySelector('h3').textContent, a.dataset.values])"""
ENTER = """(() => { const field = document.getElementById('%s'); field.value = '%s';
    field.dispatchEvent(new Event('input')); })()"""


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1400, False), (1400, True)])
def test_the_page_fits_loads_and_complains_of_nothing(report, browser, tmp_path, width, dark):
    browser.open(report.page, width=width, dark=dark)
    assert browser.run(ALL_LOADED)
    assert browser.run("document.images.length") == report.num_shown
    assert browser.run("[...document.images].every((i) => i.naturalWidth > 0 && i.alt.length > 0)")
    assert max(browser.run(WIDTHS)) <= width
    assert browser.run("document.title") == "clips – clips"  # no caption has run
    assert browser.run("[...document.querySelectorAll('svg')].every((s) => s.getAttribute('aria-label').length > 20)")
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert browser.complaints == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    with Image.open(browser.screenshot(tmp_path / "page.png", full=False)) as picture:
        colors = picture.convert("L").getcolors(1 << 16)
    most = max(colors)[1]
    assert most < 60 if dark else most > 200  # the paper
    assert len(colors) > 20


def test_cards_can_be_found_and_sorted(report, browser):
    browser.open(report.page, width=1400)
    ids = browser.run(IDS)
    assert len(ids) == report.num_shown
    browser.run(ENTER % ("find", "WALK  bold"))
    walking = browser.run(IDS)
    assert walking == [name for name in ids if name.startswith("walk")] and 0 < len(walking) < len(ids)
    assert browser.run("document.getElementById('found').value") == f"{len(walking)} of {len(ids)}"
    browser.run(ENTER % ("find", ""))
    assert browser.run(IDS) == ids
    figures = {name: json.loads(values) for name, values in browser.run(VALUES)}
    for figure, sign in (("blur", 1), ("mask_area_jitter", -1)):
        browser.run(ENTER % ("order", figure))
        assert browser.run(IDS) == sorted(ids, key=lambda name: sign * figures[name][figure])
    browser.run(ENTER % ("order", ""))
    assert browser.run(IDS) == ids
    assert browser.complaints == []


def test_a_picture_plays_its_video_in_its_place(report, browser):
    browser.open(report.page, width=400)
    browser.run("document.querySelector('.play a').scrollIntoView()")  # what is out of sight does not play
    browser.run("document.querySelector('.play a').click()")
    browser.wait_for("document.querySelector('#cards video').readyState >= 2")
    assert browser.run("document.querySelector('video').videoHeight") > 0
    browser.wait_for("document.querySelector('video').currentTime > 0")
    assert browser.run("document.querySelectorAll('#cards img').length") == report.num_shown - 1
    browser.run("document.querySelector('video').click()")  # its controls lead nowhere else
    assert browser.run("location.href") == report.page.resolve().as_uri()
    assert browser.complaints == []
    assert max(browser.run(WIDTHS)) <= 400
