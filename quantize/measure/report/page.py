"""The report as one HTML file that needs nothing else: no network, no fonts, no scripts of others."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.format_costs import TARGET_DB
from qtool.quantize.measure.report.headline import headlines
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.tables import recommendation_table, site_table

_DOT = re.compile(r"(?<=[a-z0-9])\.(?=[a-z0-9])")


def page(findings: Findings, sections: list[Section], title: str, facts: Mapping[str, str]) -> str:
    """The whole page. Its policy admits only its own style and script, by their hashes, and pictures inside it."""
    look, script = _own("page.css"), _own("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(breakable=_breakable, picture=_picture, width=_width, height=_height)
    return environment.from_string(_own("page.html")).render(
        title=title,
        facts=facts,
        headlines=headlines(findings),
        sections=sections,
        advice=recommendation_table(findings),
        targets=" or ".join(f"{db:g} dB ({bits} bits)" for bits, db in TARGET_DB.items()),
        sites=site_table(findings),
        site_count=len(findings.sites),
        style=Markup(look),
        script=Markup(script),
        policy=(
            f"default-src 'none'; style-src '{_hash(look)}'; img-src data:; script-src '{_hash(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
    )


def _own(name: str) -> str:
    return (files("qtool.quantize.measure.report") / name).read_text(encoding="utf-8")


def _breakable(text: str) -> Markup:
    """Escaped, with places inside site names where a line may break."""
    return Markup(_DOT.sub(".<wbr>", str(escape(text))))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _picture(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _width(png: bytes) -> int:
    return int(struct.unpack(">I", png[16:20])[0])


def _height(png: bytes) -> int:
    return int(struct.unpack(">I", png[20:24])[0])
