"""The page of a bundle: complete, escaped, the same bytes every time, and nothing in it that would have to be fetched."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

import repdeploy
from repdeploy.bundle import BENCH, Bundle, write_text
from repdeploy.errors import BackendMissing
from repdeploy.measurements import Bench, BenchRow, bench_from_json
from repdeploy.page import quantities, scales
from repdeploy.page import stage as pages
from repdeploy.page.content import document
from repdeploy.page.document import Cell, Document, Fold, Listing, Notice, Paragraph, Section, Tile, code, pairs, table
from repdeploy.page.html import html
from repdeploy.page.markdown import markdown
from repdeploy.page.pictures import Densities, Latencies, Roof, Speedups
from repdeploy.page.plots import drawn
from repdeploy.records import (
    Artifact,
    Check,
    Drift,
    GraphReport,
    KeptNode,
    Manifest,
    PrunedLayer,
    Pruning,
    Verdict,
    WideLayer,
    to_json,
)  # fmt: skip
from tests import measured

SAMPLE = Path(__file__).resolve().parents[2] / "sample_models" / "checkpoints" / "repvgg_digits.pth"
EVIL = "a<script>alert('1')</script>|`*_[x](http://example.org)&amp;"
VOID = {"meta", "link", "br", "hr", "img"}
ARTIFACT = Artifact(
    "model.fp16.onnx", "onnx", "fp16", "ab" * 32, 188_000, "cd" * 32, "repdeploy export --precision fp16", (1, 1, 33, 33), 20,
    ("batch",), (Check("artifact", "model.fp16.onnx in onnxruntime, batch 2", 1.2e-3, 1e-2),), {"softmax": "True"},
    wide=(WideLayer("head", "ReduceMean", "kept in float32"),), drift=(Drift("stage1.0", 9e-4),), notes=("judged alone",),
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("page") / "digits.repdeploy"
    repdeploy.convert(SAMPLE, output=path)
    return Bundle(path)


@pytest.fixture(scope="module")
def manifest(bundle: Bundle) -> Manifest:
    return bundle.manifest.with_artifact(ARTIFACT)


@pytest.fixture(scope="module")
def full(manifest: Manifest) -> str:
    return html(document(manifest, measured.bench(), "digits.repdeploy"))


class Outline(HTMLParser):
    """What a browser makes of a page: headings, identifiers, links, text, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.identifiers: list[str] = []
        self.targets: set[str] = set()
        self.addresses: set[str] = set()
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.identifiers.append(value or "")
            elif name == "aria-labelledby" or (name == "href" and (value or "").startswith("#")):
                self.targets.add((value or "").removeprefix("#"))
            elif name in ("href", "src", "srcset", "action"):
                self.addresses.add(value or "")
            self.targets |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
        if tag in ("h2", "h3"):
            self.headings.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self.words += " " if tag in ("td", "th", "dd", "dt") else ""

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1] = self.open[-1], data


def test_sections_come_in_the_promised_order(full: str) -> None:
    assert Outline(full).headings == [
        ("h2", "Verdict"),
        ("h2", "The network before and after"),
        ("h2", "Artifacts"),
        ("h2", "Benchmark"),
        ("h3", "What holds it back, and what helps"),
        ("h3", "Memory before and after"),
        ("h3", "Share of 3x3 convolutions"),
        ("h3", "Every convolution"),
        ("h3", "Computational density by kernel size"),
        ("h3", "What this device reaches at best"),
        ("h3", "Not measured"),
        ("h3", "Beside the baseline"),
        ("h3", "Doubts"),
        ("h2", "Where it was measured"),
        ("h2", "How to reproduce it"),
    ]


def test_a_page_is_closed_in_itself(full: str) -> None:
    found = Outline(full)
    assert found.open == []
    assert len(found.identifiers) == len(set(found.identifiers))
    assert found.targets <= set(found.identifiers)
    assert found.addresses == {"data:,"}
    assert found.tags.isdisjoint({"script", "img", "iframe", "object", "foreignObject"})
    assert "@import" not in full
    assert "@font-face" not in full
    assert set(re.findall(r"[a-z]+://[^\s\"')<]*", full)) == {"http://www.w3.org/2000/svg"}  # the namespace of svg


def test_pictures_are_drawn_in_the_page_s_colours_with_text_as_text(full: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", full, re.DOTALL)
    assert len(pictures) == 4 * 2  # wide and narrow
    for picture in pictures:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", picture)
        assert set(re.findall(r"var\(--([a-z0-9-]+)\)", picture)) <= set(re.findall(r"--([a-z0-9-]+):", full))
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title")
        assert root[0].text
        assert root.get("width") is None
        assert sum(element.tag.endswith("}text") for element in root.iter()) > 3


def test_the_same_records_give_the_same_bytes_whatever_the_user_s_own_style_is(manifest: Manifest, full: str) -> None:
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "svg.hashsalt": None, "axes.grid": True}):
        again = html(document(manifest, bench_from_json(to_json(measured.bench())), "digits.repdeploy"))
    assert again == full


def test_every_run_is_drawn(full: str) -> None:
    picture = re.search(r"<svg[^>]*latencies-wide.*?</svg>", full, re.DOTALL)
    assert picture is not None
    rugs = [path.count("L") for path in re.findall(r'd="([^"]*)"', picture[0]) if path.count("M") > 100]
    runs = [len(timing.seconds) for row in measured.bench().rows for timing in row.timings]
    assert rugs == runs == [130] * 12


def test_numbers_are_those_of_the_records(full: str, manifest: Manifest) -> None:
    words = Outline(full).words
    first = measured.bench().rows[0]
    assert first.speedup is not None
    for text in (
        manifest.source.sha256, f"{first.speedup.ratio:.2f}x", f"{first.speedup.low:.2f} to {first.speedup.high:.2f}",
        quantities.seconds(first.timings[1].median), "143 GFLOP/s", "21.4 GB/s", "6.69 FLOP/byte", "4.82 MB", "stage1.0.add",
        "jit:avx512_core_3x3", "106%", "apt install g++", "slower", "unstable", "ONEDNN_VERBOSE", "p95", "2,600 to 3,100 MHz",
        "repdeploy bench digits.repdeploy --device cpu --batch 1 --batch 8 --threads 2 --input-shape 1x3x224x224",
        "repdeploy export --precision fp16", "kept in float32", "batchx1x33x33", "45,346", "-11.4%", "faster in 3 of 5",
    ):  # fmt: skip
        assert text in words, text
    assert "p99" not in words  # 130 runs do not allow it
    assert words.count("22 convolutions") == 6 + 1  # a fold per runtime and batch size; the finding


def test_without_a_benchmark_the_page_says_how_to_get_one(manifest: Manifest) -> None:
    content = document(replace(manifest, artifacts=()), None, "digits.repdeploy")
    page, text = html(content), markdown(content)
    assert "<svg" not in page
    for shown in (page, text):
        assert "repdeploy bench digits.repdeploy" in shown
        assert "repdeploy export digits.repdeploy" in shown


@pytest.mark.parametrize(
    ("grade", "says"),
    [("anchored", "outside this tool"), ("self-consistent", "--expect FILE.npz"), ("blocks only", "nothing is said about")],
)
def test_a_grade_is_explained(manifest: Manifest, grade: str, says: str) -> None:
    verdict = replace(manifest.verdict, grade=grade)
    words = Outline(html(document(replace(manifest, verdict=verdict), None, "digits.repdeploy"))).words
    assert says in words
    assert ("Assumed, not read from the file" in words) == (grade != "anchored")


def test_a_failed_verdict_is_the_first_thing_said(manifest: Manifest) -> None:
    checks = (
        Check("network", "float64", 3e-3, 1e-9, failure="the first block that differs is stage2.0"),
        Check("rounding", "float32", float("inf"), 0.0, failure="the output has NaN"),
        *manifest.verdict.checks,
    )
    failed = replace(manifest, verdict=Verdict(False, "self-consistent", checks, warnings=("eps was assumed",)))
    content = document(failed, None, "digits.repdeploy")
    assert content.tiles[0].value == "FAILED"
    words = Outline(html(content)).words
    assert words.index("Not verified") < words.index("gate")
    for text in ("stage2.0", "the output has NaN", "eps was assumed"):
        assert text in words
    assert "> [!CAUTION]" in markdown(content)


def test_what_users_named_is_never_markup(manifest: Manifest) -> None:
    block = replace(manifest.blocks[0], name=EVIL, formula=EVIL)
    source = replace(manifest.source, file=EVIL, where=EVIL)
    bench = measured.bench()
    profile = bench.rows[0].profiles[0]
    named = replace(profile, layers=(replace(profile.layers[0], name=EVIL, implementation=EVIL), *profile.layers[1:]))
    first = replace(bench.rows[0], runtime=EVIL, profiles=(named,), warnings=(EVIL,))
    bench = replace(bench, rows=(first, *bench.rows[1:]), notes=(EVIL,), environment={EVIL: EVIL})
    checks = (Check("algebra", EVIL, 1.0, 0.5, EVIL, EVIL, EVIL),)
    changed = replace(
        manifest, source=source, blocks=(block,), verdict=Verdict(False, "blocks only", checks, warnings=(EVIL,)),
        notes=(EVIL,), dropped=((EVIL, EVIL),), command=EVIL,
    )  # fmt: skip
    content = document(changed, bench, EVIL)
    page = Outline(html(content))
    assert page.tags.isdisjoint({"script"})
    assert page.words.count("<script>") > 12
    assert page.open == []
    parsed = MarkdownIt().enable("table").parse(markdown(content))
    raw = [token.content for token in _flat(parsed) if token.type in ("html_block", "html_inline")]
    assert all(text.strip().startswith(("<details><summary>", "</details>")) for text in raw)
    assert not any("<script>" in text for text in raw)
    assert not any(token.type in ("link_open", "image", "em_open") for token in _flat(parsed))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc",))).map(lambda text: " ".join(text.split())).filter(bool))
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    cells = table("", ("name", ">n"), [(text, "1"), (code(text), "2"), (Cell(text, "bad"), "3")])
    nodes = (
        Paragraph(f"Note: {text}"), cells, Listing((text,)), pairs((text, code(text))), Notice(text, (text,), text),
        Fold(text, (Paragraph(f"Note: {text}"),)),
    )  # fmt: skip
    shown = Document(text, text, (Tile(text, text, text),), pairs((text, text)), (Section(text, nodes),))
    tokens = MarkdownIt().enable("table").parse(markdown(shown))
    note, pair = f"Note: {text}", f"{text}: {text}"
    assert [_words(token) for token in tokens if token.type == "inline"] == [
        text, text, text, f"{text} ({text})", pair, text, note, "name", "n", text, "1", text, "2", text, "3",
        text, pair, f"[!WARNING]\n{text}", text, f"What to do: {text}", note,
    ]  # fmt: skip
    folds = [token.content for token in tokens if token.type == "html_block"]
    assert folds == [f"<details><summary>{escape(text)}</summary>\n", "</details>"]


def _flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from token.children or ()


def _words(token: Token) -> str:
    """What a reader of one paragraph, heading or cell sees."""
    breaks = {"softbreak": "\n", "hardbreak": "\n"}
    return "".join(breaks.get(child.type, child.content) for child in token.children or ())


def test_a_graph_and_a_pruned_network_are_told_of(manifest: Manifest) -> None:
    graph = GraphReport(
        "model.onnx", "ab" * 32, 18, (), (), (("image", (1, 3, 64, 64)),), (("Conv", 12), ("BatchNormalization", 12)),
        (("Conv", 4),), 2_000_000, 1_000_000, 4_000_000, 1_000_000,
        (KeptNode(EVIL, "Conv", "its region would grow", 5_000, 9_000), KeptNode("", "Pool", "it is not linear")),
    )  # fmt: skip
    pruning = Pruning((PrunedLayer("conv1", 16, 9),), 3_000_000, 2_000_000, 50_000, 30_000, False, 1e-4, ("kept two",))
    pruned, squeezed = replace(manifest, pruning=pruning), replace(manifest, graph=graph)
    words = "".join(Outline(html(document(told, None, "digits.repdeploy"))).words for told in (pruned, squeezed))
    for text in (
        "BatchNormalization", "2.00 MFLOP → 1.00 MFLOP", "Not squeezed: 2 linear operators", "its region would grow",
        "7 channels left", "-43.8%", "1.0e-04 (relative)", "kept two", "gave up at zero", "The squeezed graph computes",
    ):  # fmt: skip
        assert text in words, text


def _sparse() -> Iterator[Bench]:
    bench = measured.bench(12)
    first = bench.rows[0]
    alone = replace(first, timings=first.timings[1:], speedup=None, profiles=(), memory=(), findings=(), watched=None)
    idle = replace(first.profiles[1], layers=tuple(replace(layer, seconds=0.0) for layer in first.profiles[1].layers))
    yield replace(bench, rows=(alone,), rooflines=(), density=(), baseline=())
    yield replace(bench, rows=bench.rows[-1:], density=(), rooflines=())
    yield replace(bench, rows=(replace(first, profiles=(idle,)),))
    yield replace(bench, rows=(first, replace(first, device="cuda", drift=2e-3)), rooflines=(), density=bench.density[:1])
    yield replace(bench, rows=(BenchRow("torch", "cpu", 1, alone.timings, None),), notes=())


@pytest.mark.parametrize("bench", list(_sparse()))
def test_what_was_not_measured_leaves_no_hole(manifest: Manifest, bench: Bench) -> None:
    content = document(manifest, bench, "digits.repdeploy")
    page = Outline(html(content))
    assert page.open == []
    assert "nan" not in page.words.lower().split()
    assert "None" not in page.words.split()
    assert markdown(content)


def test_devices_are_named_where_there_are_several(manifest: Manifest) -> None:
    row = measured.bench(12).rows[0]
    both = replace(measured.bench(12), rows=(row, replace(row, device="cuda")), rooflines=(), density=())
    shown = markdown(document(manifest, both, "digits.repdeploy"))
    assert "torch (cuda), batch 1" in shown
    for device in ("cpu", "cuda"):
        assert f"repdeploy bench digits.repdeploy --device {device} --batch 1 --threads 2 --input-shape 1x3x224x224" in shown


def test_a_report_is_written_into_the_bundle_or_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    write_text(bundle.path / BENCH, to_json(measured.bench(12)))
    made = pages.report(bundle, None, as_markdown=False)
    assert (made.file, made.form, made.measured) == (bundle.path / "report.html", "html", True)
    assert made.file is not None
    assert made.file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    text = pages.report(bundle, None, as_markdown=True)
    assert text.file is None
    elsewhere = pages.report(bundle, tmp_path / "report.md", as_markdown=True)
    assert elsewhere.text == ""
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text.text + "\n"


@pytest.mark.parametrize("absent", pages.NEEDED)
def test_without_its_libraries_only_the_html_page_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)  # as import sees what is not installed
    with pytest.raises(BackendMissing, match=absent) as refusal:
        pages.report(bundle, None, as_markdown=False)
    assert "pip install repdeploy[report]" in refusal.value.hint
    assert pages.report(bundle, None, as_markdown=True).text


def test_text_and_lines_stand_out_from_their_ground(full: str) -> None:
    """WCAG 2.1, success criteria 1.4.3 (text: 4.5) and 1.4.11 (graphics: 3), in both colour schemes."""
    schemes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", full, re.S)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for name in ("ink", "quiet", "accent", "good", "bad", "warn"):
            for ground in ("paper", "panel"):
                assert _contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        for ground in ("good-panel", "bad-panel", "warn-panel"):
            assert _contrast(scheme["ink"], scheme[ground]) >= 4.5, ground
        for name in (name for name in scheme if name.startswith("series")):
            assert _contrast(scheme[name], scheme["paper"]) >= 4.5, name  # numbers stand on bars, in the paper's colour


def _contrast(first: str, second: str) -> float:
    def luminance(text: str) -> float:
        channels = [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, bright = sorted((luminance(first), luminance(second)))
    return (bright + 0.05) / (dark + 0.05)


def test_texts_of_a_picture_do_not_overlap() -> None:
    """By the widths that a sans-serif font has at most; both formats of every picture."""
    bench = measured.bench(12)
    (roof,) = bench.rooflines
    rows = tuple(row for row in bench.rows if row.timings)
    profiles = tuple((row.runtime, row.profiles[-1]) for row in rows)
    pictures = (
        Speedups(rows),
        Latencies(rows),
        Densities(bench.density, roof.gflops),
        Roof(roof, profiles),
    )
    for picture in pictures:
        for name, svg in drawn(picture):
            boxes = sorted(_boxes(ElementTree.fromstring(svg)))
            for (left, right, base, text), (other_left, other_right, other_base, other) in pairwise(boxes):
                apart = abs(base - other_base) >= 11 or right <= other_left or other_right <= left
                assert apart, (picture.name, name, text, other)


def _boxes(root: ElementTree.Element) -> Iterator[tuple[float, float, float, str]]:
    """Left and right end, base line and text of everything that stands upright."""
    for element in root.iter():
        if element.tag.endswith("}text") and "rotate(-90" not in element.get("transform", ""):
            words, style = element.text or "", element.get("style", "")
            width = len(words) * 6.6
            x = float(element.get("x", "0"))
            left = x - width if "end" in style else x - width / 2 if "middle" in style else x
            yield left, left + width, float(element.get("y", "0")), words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (quantities.seconds(0.0123), "12.3 ms"), (quantities.seconds(1.5), "1.50 s"), (quantities.seconds(4.2e-5), "42.0 µs"),
        (quantities.size(999), "999 B"), (quantities.size(4_816_896), "4.82 MB"), (quantities.flops(1.83e9), "1.83 GFLOP"),
        (quantities.number(1234.5), "1,234"), (quantities.number(0.00123), "0.00123"), (quantities.number(0), "0"),
        (quantities.error(1.4e-15), "1.4e-15"), (quantities.error(float("inf")), "-"), (quantities.percent(0.0001), "< 0.1%"),
        (quantities.percent(0.9999), "100%"), (quantities.percent(1.06), "106%"), (quantities.change(200, 150), "-25.0%"),
        (quantities.change(0, 1), "-"),
    ],
)  # fmt: skip
def test_numbers_carry_three_digits_and_a_unit(value: str, shown: str) -> None:
    assert value == shown


@given(st.floats(1e-6, 1e6), st.floats(1.0001, 1e6), st.integers(4, 9))
def test_ticks_are_few_and_inside(low: float, factor: float, most: int) -> None:
    found = scales.ticks(low, low * factor, most)
    assert len(found) <= max(most + 1, 8)
    assert all(low <= tick <= low * factor for tick in found)
    assert found == sorted(found)
