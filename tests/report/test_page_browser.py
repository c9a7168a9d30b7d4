"""report.html in headless Chromium, on a phone and on a desk, in the light and in the dark: what a reader would see."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import report_samples
from layerprune.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
PHONE, DESK = 390, 1100
LIGHT, DARK = "light", "dark"
PAGE = {LIGHT: (251, 251, 249), DARK: (20, 23, 26)}
ACCENT = {LIGHT: (179, 68, 30), DARK: (240, 138, 93)}
TEXT_CONTRAST, SHAPE_CONTRAST = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11, level AA

# Runs in the page, with everything unfolded, and writes down what it finds.
MEASURE = """
for (const one of document.querySelectorAll("details")) one.open = true;
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = text => {
  const [r, g, b] = rgb(text).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = one => {
  for (let at = one; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (rgb(colour).length === 3 || rgb(colour)[3] > 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
const contrast = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  fetched: performance.getEntriesByType("resource").length,
  plots: [], cut: [], over: [], faint: [], faintShapes: [], wide: [], small: [],
};
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  const style = getComputedStyle(one), inPlot = one.closest("svg") !== null;
  if (own && one.tagName !== "title" && one.tagName !== "SCRIPT") {
    const ratio = contrast(inPlot ? style.fill : style.color, ground(one));
    if (ratio < %(text)s) found.faint.push([one.textContent.trim().slice(0, 30), ratio]);
    const size = parseFloat(style.fontSize) * (inPlot ? Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b) : 1);
    if (size < 10.5) found.small.push([one.textContent.trim().slice(0, 30), size]);
  }
  if (!inPlot && !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1)
    found.wide.push(one.tagName + " " + one.textContent.trim().slice(0, 30));
}
for (const plot of document.querySelectorAll("svg")) {
  const box = plot.getBoundingClientRect();
  const texts = [...plot.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
  const shapes = plot.querySelectorAll("rect, circle");
  found.plots.push([plot.getAttribute("aria-label"), box.width, box.height, shapes.length]);
  for (const [said, own] of texts)
    if (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1)
      found.cut.push(said);
  texts.forEach(([said, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    if (across > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3) found.over.push([said, other]);
  }));
  for (const shape of shapes) {
    const style = getComputedStyle(shape), edge = style.stroke === "none" ? style.fill : style.stroke;
    const ratio = Math.max(contrast(style.fill, ground(plot)), contrast(edge, ground(plot)));
    if (ratio < %(shape)s) found.faintShapes.push([shape.getAttribute("class"), ratio]);
  }
}
const note = parent.document.createElement("pre");
note.id = "measured";
note.textContent = JSON.stringify(found);
parent.document.body.append(note);
""" % {"text": TEXT_CONTRAST, "shape": SHAPE_CONTRAST}  # noqa: UP031  braces are the script's


def chromium(page, profile, width, height, scheme, *words):
    """Run Chromium on one file, with a network it cannot use."""
    scheme_number = {DARK: 0, LIGHT: 1}[scheme]
    off = [f"--disable-{what}" for what in ("gpu", "background-networking", "component-update", "sync")]
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", *off,
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={scheme_number}",
        f"--user-data-dir={profile}", f"--window-size={width},{height}", *words, Path(page).as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def measured(page, tmp_path, width, scheme):
    """Return what the script found in a copy of the page, in a frame: no window is narrower than 500."""
    text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
    inner = html.escape(text.replace("</body>", f"<script>{MEASURE}</script></body>"))
    frame = f'<iframe style="width: {width}px; height: 2000px; border: 0" srcdoc="{inner}"></iframe>'
    outer = tmp_path / "measured.html"
    outer.write_text(f'<!doctype html><meta name="color-scheme" content="light dark"><body>{frame}', encoding="utf-8")
    dom = chromium(outer, tmp_path / "profile", DESK + 100, 2000, scheme, "--dump-dom")
    (note,) = re.findall(r'<pre id="measured">(.*?)</pre>', dom, re.S)
    return json.loads(html.unescape(note))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(report_samples.folder(tmp_path_factory.mktemp("sample"), healed=True))


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_cut_off_crowded_faint_or_fetched(page, tmp_path, width, scheme):
    found = measured(page, tmp_path, width, scheme)
    assert found["width"] == width
    assert found["scroll"] <= width, found["wide"]
    assert len(found["plots"]) == 4  # accuracies, the path, two rankings
    assert all(across > 300 and down > 80 and shapes >= 5 for _, across, down, shapes in found["plots"]), found["plots"]
    assert found["cut"] == []
    assert found["over"] == []
    assert found["small"] == []
    assert found["faint"] == []
    assert found["faintShapes"] == []
    assert found["fetched"] == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ((".scroll { overflow-x: auto; }", ""), "scroll"),
        (("--soft: #a9b3bd", "--soft: #3a4149"), "faint"),
        (("--bar: #64798f", "--bar: #252b31"), "faintShapes"),
        ((".tick { font-size: 21px; }", ".tick { font-size: 60px; }"), "over"),
        ((".tick { font-size: 21px; }", ".tick { font-size: 14px; }"), "small"),
        (("<main>", '<main><img src="http://127.0.0.1:9/dot.png">'), "fetched"),
    ],
)  # fmt: skip
def test_the_measurements_can_fail(page, tmp_path, change, complaint):
    text = page.read_text(encoding="utf-8")
    assert change[0] in text
    found = measured(text.replace(*change), tmp_path, PHONE, DARK)
    value = found[complaint]
    assert value > PHONE if complaint == "scroll" else value


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, LIGHT), (DESK, DARK)])
def test_the_picture_shows_the_page_from_top_to_bottom(page, tmp_path, width, scheme):
    from PIL import Image

    shot = tmp_path / "shot.png"
    chromium(page, tmp_path / "profile", width, 2400, scheme, f"--screenshot={shot}")
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (width, 2400)
    colours = {colour for _, colour in picture.getcolors(10_000_000)}
    assert {PAGE[scheme], ACCENT[scheme]} <= colours  # styles and plots arrived
    assert {picture.getpixel((width - 1, y)) for y in range(0, 2400, 7)} == {PAGE[scheme]}
    bands = [picture.crop((0, top, width, top + 300)) for top in range(0, 2400, 300)]
    assert all(len(band.getcolors(10_000_000)) > 20 for band in bands)  # no blank stretch
