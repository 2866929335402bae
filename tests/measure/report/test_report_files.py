import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtool.quantize.measure.report import terminal_tables, write_report
from qtool.quantize.measure.report.canvas import figure_style
from qtool.quantize.measure.report.figures import experts, pictures, sample_size
from qtool.quantize.measure.report.tables import recommendation_table
from qtool.quantize.measure.report.write import report_sections

HOSTILE = "<script>alert(1)</script> | $x$ \u202e"
VOID = {"meta", "img", "input", "wbr", "br"}


class Page(HTMLParser):
    """Checks nesting; collects references, scripts, styles, images and all text outside them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.references: list[str] = []
        self.own: dict[str, list[str]] = {"script": [], "style": []}
        self.images: list[dict[str, str | None]] = []
        self.policy = ""
        self.text: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [found[name] or "" for name in ("src", "href", "action", "srcset") if name in found]
        assert not [name for name in found if name.startswith("on")]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        self.own.get(inside, self.text).append(data)


def read(folder: Path) -> Page:
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def report(llama: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, llama.findings, llama.statistics, title=HOSTILE, facts={"corpus|": HOSTILE, "length": "96"})
    return folder


def test_the_page_needs_nothing_from_outside(report: Path) -> None:
    page = read(report)
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in page.references)
    assert {ref[1:] for ref in page.references if ref.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "@import" not in "".join(page.own["style"])
    assert "url(" not in "".join(page.own["style"])
    assert not re.search(r"https?://", (report / "report.html").read_text())


def test_the_policy_admits_just_the_style_and_the_script_of_the_page(report: Path) -> None:
    page = read(report)
    assert page.policy.startswith("default-src 'none'; ")
    for name in ("script", "style"):
        (text,) = page.own[name]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in page.policy


def test_the_page_names_the_massive_channel_its_token_and_its_layers(report: Path) -> None:
    text = re.sub(r"\s+", " ", "".join(read(report).text))
    assert "In channel 37, at position 0 (“Once”), from block 1 to block 2" in text
    assert "Massive activations live in the output of 2 blocks, 1 to 2." in text


def test_foreign_text_is_shown_and_never_run(report: Path) -> None:
    page = read(report)
    assert len(page.own["script"]) == 1
    assert "<script>alert(1)</script> | $x$ \\u202e" in "".join(page.text)
    card = (report / "model-card.md").read_text()
    assert "<script" not in card
    assert "\u202e" not in card
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert len(lines) > 10
    assert set(columns) == {10, 3, 6}


def test_every_figure_is_in_the_page_described_and_readable_on_a_slide(report: Path) -> None:
    images = read(report).images
    pngs = {p.name: p.read_bytes() for p in (report / "figures").iterdir()}
    assert {base64.b64decode((i["src"] or "").split(",")[1]) for i in images} == set(pngs.values())
    assert {i["width"] for i in images} == {"1600"}
    assert all(len(i["alt"] or "") > 40 for i in images)
    assert all(b"tEXt" not in png for png in pngs.values())
    linked = set(re.findall(r"\]\((figures/[^)]+)\)", (report / "model-card.md").read_text()))
    assert linked == {"figures/maxima.png", "figures/format-costs.png"}
    assert all((report / link).is_file() for link in linked)


def test_all_sites_are_in_the_table(report: Path, llama: SimpleNamespace) -> None:
    text = "".join(read(report).text)
    assert all(row.site in text for row in llama.findings.sites)


def test_the_same_findings_give_the_same_bytes(report: Path, llama: SimpleNamespace, tmp_path: Path) -> None:
    write_report(tmp_path, llama.findings, llama.statistics, title=HOSTILE, facts={"corpus|": HOSTILE, "length": "96"})
    assert files_of(tmp_path) == files_of(report)


def test_json_on_disk_is_strict(report: Path, llama: SimpleNamespace) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    found = json.loads((report / "findings.json").read_text(), parse_constant=refuse)
    assert len(found["sites"]) == len(llama.findings.sites)


def test_the_terminal_tables_fit_and_are_short(llama: SimpleNamespace) -> None:
    tables = terminal_tables(llama.findings)
    assert len(tables) == 5
    for _, columns, rows in tables:
        assert len(rows) <= 12
        assert all(len(row) == len(columns) for row in rows)
        widest = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
        assert sum(widest) + 3 * len(columns) + 1 <= 160
    assert any("37 (12 ×)" in cell for row in tables[1][2] for cell in row)


def test_a_mixture_shows_its_experts_as_one_kind(made_up: Callable[..., Any]) -> None:
    findings, statistics = made_up("moe", 2)
    with figure_style():
        section = experts.draw(findings, statistics)
    assert section.png
    assert section.sentence.startswith("2 experts of 8 were never chosen. The busiest is expert 0 of block 0 with 50 %")
    kinds = [row[0] for row in recommendation_table(findings).rows]
    assert [kind for kind in kinds if "expert" in kind] == ["experts.*.gate_proj.input", "experts.*.down_proj.input"]


def test_a_state_space_model_says_what_does_not_apply(made_up: Callable[..., Any], tmp_path: Path) -> None:
    findings, statistics = made_up("mamba", 3, massive=False)
    write_report(tmp_path, findings, statistics, title="m", facts={})
    text = "".join(read(tmp_path).text)
    assert "no attention" in text
    assert "keeps no keys and values" in text
    assert "No value of the residual stream is above 100" in text
    assert not {"attention-sinks.png", "kv-cache.png", "experts.png"} & set(files_of(tmp_path / "figures"))


def test_findings_with_hardly_anything_still_make_a_report(made_up: Callable[..., Any]) -> None:
    findings, statistics = made_up("mamba", 1, massive=False)
    size = replace(findings.sample_size, sequences=(), cv=(), worst_cv=(), enough=None)
    bare = replace(findings, formats=(), splits=(), lengths=(), domains=(), sample_size=size)
    left_out = {section.name for section in report_sections(bare, statistics) if not section.png}
    assert {"format-costs", "outlier-split", "lengths", "domains", sample_size.NAME} <= left_out
    assert pictures.NAME not in left_out


@pytest.mark.parametrize("scale", [0.0, 1e30])
def test_dead_and_extreme_sites_make_a_report(made_up: Callable[..., Any], scale: float) -> None:
    findings, statistics = made_up("mamba", 1, massive=False, scale=lambda site: scale)
    assert {section.name: section for section in report_sections(findings, statistics)}["maxima"].png
