"""The page for people who decide: one file, no script, safe, and drawn in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from auditing.test_report import NASTY, VERDICTS, nasty
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.report import render
from fedqsn_cli.auditing.report.html_plots import label, layer_of
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.html import charts
from support.audits import audit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "rect", "line", "circle", "path"}


class Page(HTMLParser):
    """Elements, checked for balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "rect" and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page(given: Audit) -> Page:
    text = render(given, "html")
    return Page(re.sub(r"<(circle)([^>]*[^/])>", r"<\1x\2>", text).replace("</circle>", "</circlex>"))


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_page_is_well_formed_and_begins_with_the_verdict(verdict: str) -> None:
    found = page(audit(verdict=verdict))
    titles = {
        "passed": "Passed",
        "over the limits": "Over the limits",
        "incomplete": "Not complete",
        "broken": "Do not send",
    }
    assert found.text.index(titles[verdict]) < found.text.index("of all parameters never leave the owner")


def test_the_page_shows_exposure_coalitions_heat_map_recovery_and_rho() -> None:
    found = page(audit())
    assert found.count("svg") == 5
    for heading in (
        "What clients have seen",
        "What clients could see together",
        "Who has seen what",
        "What can be recovered",
        "What the recovered model can do",
        "The best attack on each proxy",
    ):
        assert heading in found.text


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = render(audit(), "html")
    assert not re.search(r"<script|<link|<img|<iframe|javascript:|@import|url\(|\son\w+=", text)
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)


def test_hostile_names_are_text() -> None:
    found = page(nasty())
    assert "c" not in {tag for tag, _ in found.elements}
    assert NASTY.split("\n")[0] in found.text


def test_every_plot_has_a_name_for_those_who_cannot_see_it() -> None:
    for tag, attributes in page(audit()).elements:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]


def test_an_audit_of_the_ledger_alone_is_a_page_too() -> None:
    given = replace(audit(), recovery=(), function=None)
    assert "What can be recovered" not in page(given).text
    assert page(replace(given, exposure=None)).count("svg") == 0


def test_many_clients_become_a_band_and_the_worst_rows() -> None:
    found = page(audit(clients=200, rounds=2))
    assert "The 32 most exposed of 200 clients." in found.text
    assert len(render(audit(clients=200, rounds=2), "html")) < 600_000


def test_an_empty_ledger_draws_nothing() -> None:
    from support.audits import job

    assert page(replace(audit(), exposure=exposure(job(), []))).count("svg") == 2


@pytest.mark.parametrize(
    ("name", "layer", "short"),
    [
        ("bert.encoder.layer.3.attention.self.query", "layer 3", "3 attention.query"),
        ("model.layers.11.mlp.down_proj", "layer 11", "11 down_proj"),
        ("transformer.h.0.attn.c_attn", "layer 0", "0 attn.c_attn"),
        ("bert.embeddings.word_embeddings", "embeddings", "word_embeddings"),
        ("lm_head", "head", "lm_head"),
        ("something", "other", "something"),
    ],
)
def test_names_of_modules_become_short(name: str, layer: str, short: str) -> None:
    assert (layer_of(name), label(name)) == (layer, short)


def test_ticks_are_few_whole_numbers() -> None:
    assert charts.whole_ticks(0, 3) == [0, 1, 2, 3]
    assert charts.whole_ticks(0, 100)[:3] == [0, 15, 30]
    assert len(charts.whole_ticks(0, 10**6)) <= 8


def test_a_point_outside_the_frame_is_drawn_at_its_edge() -> None:
    plot = charts.Plot("t", "x", [charts.Line("worst", [(0.0, -5.0), (1.0, 7.0)])])
    numbers = [float(y) for y in re.findall(r'cy="([\d.]+)"', charts.draw(plot))]
    assert all(0 <= y <= charts.HEIGHT for y in numbers)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page's structure is tested above")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_the_page_without_sideways_scrolling(tmp_path: Path, width: int) -> None:
    """The page reports its own width through the title, because only its outermost box may be as wide as the window."""
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    text = render(audit(verdict="over the limits"), "html").replace("</body>", probe)
    if "drawn" not in drawn("<title>not yet</title><script>document.title = 'drawn'</script>", tmp_path, width):
        pytest.skip("this Chromium draws no file of a temporary folder (as in a snap); the page's structure is tested")
    shown = drawn(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), tmp_path, width)
    found = re.search(r"<title>(\d+) (\d+)</title>", shown)
    assert found, shown
    assert int(found[1]) <= int(found[2])


def drawn(text: str, folder: Path, width: int) -> str:
    """The title that a page has once it is drawn, or what the browser says instead."""
    (folder / "r.html").write_text(text, "utf-8")
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--dump-dom"]
    words.append(f"--user-data-dir={folder / 'profile'}")
    done = subprocess.run([*words, (folder / "r.html").as_uri()], capture_output=True, text=True, timeout=600)
    found = re.search(r"<title>.*?</title>", done.stdout)
    return found[0] if found else done.stderr
