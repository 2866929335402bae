"""Reports: written whole, read back equal, and refused when anything in them is off."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.errors import InputRefused, UsageError
from qtool.runtime.evaluate import Evaluation
from qtool.runtime.report import EvaluationReport

SHA = "ab" * 32


@pytest.fixture
def report() -> EvaluationReport:
    generator = np.random.default_rng(0)
    losses = generator.gamma(1, 2, (3, 20)).astype(np.float32)
    logprobs = -np.sort(generator.gamma(1, 2, (3, 20, 17)), axis=-1).astype(np.float16)
    evaluation = Evaluation(
        losses=losses,
        top_ids=generator.integers(0, 320, (3, 20, 16), dtype=np.int32),
        top_logprobs=logprobs,
        tokens_sha256=SHA,
        vocab_size=320,
        kl=np.abs(losses) * 0.01,
        agree=losses > 0.1,
        reference_losses=losses * 0.99,
    )
    return EvaluationReport.of(
        evaluation,
        subject="package",
        subject_digest=SHA,
        text_sha256=SHA,
        tokenizer_sha256=SHA,
        reference="model",
        reference_digest=SHA,
    )


def test_round_trip(report: EvaluationReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write(path)
    again = EvaluationReport.read(path)
    assert again == report
    assert again.to_bytes() == path.read_bytes()
    assert again.loss_array().shape == (3, 20)
    assert again.top_id_array().shape == (3, 20, 16)
    assert again.top_logprob_array().shape == (3, 20, 17)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_existing_report_is_replaced_only_when_told(report: EvaluationReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        report.write(path)
    assert path.read_text() == "mine"
    report.write(path, replace=True)
    assert EvaluationReport.read(path) == report


def test_a_failed_write_leaves_nothing(
    report: EvaluationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtool.runtime.report.write_file", full)
    with pytest.raises(OSError, match="space"):
        report.write(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_report_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        EvaluationReport.read(tmp_path / "none.json")
    assert caught.value.exit_code == 2


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.__setitem__(name, value)


def inside(name: str, dtype: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        array = np.frombuffer(base64.b64decode(data[name]), dtype=dtype).copy()
        array[5] = value
        data[name] = base64.b64encode(array.tobytes()).decode()

    return change


CORRUPTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "newer": setting("schema_version", 2),
    "version as text": setting("schema_version", "1"),
    "another kind": setting("kind", "package"),
    "unknown field": setting("extra", 1),
    "missing field": lambda data: data.pop("losses") and None,
    "metric as text": setting("perplexity", "5.0"),
    "metric NaN": setting("perplexity", float("nan")),
    "metric infinite": setting("perplexity", float("inf")),
    "metric null": setting("perplexity", None),
    "metric of other losses": lambda data: data.__setitem__("perplexity", data["perplexity"] * 1.01),
    "reference NaN": lambda data: data["reference"].__setitem__("kl_nats", float("nan")),
    "bad digest": setting("text_sha256", "ABC"),
    "other size": setting("sequences", 4),
    "size as float": setting("sequences", 3.0),
    "negative size": setting("sequences", -3),
    "huge size": setting("length", 2**70),
    "not base64": setting("losses", "???"),
    "base64 with junk": lambda data: data.__setitem__("losses", "\n" + data["losses"]),
    "short array": lambda data: data.__setitem__("losses", data["losses"][:-8]),
    "loss NaN": inside("losses", "<f4", float("nan")),
    "loss infinite": inside("losses", "<f4", float("inf")),
    "loss negative": inside("losses", "<f4", -1.0),
    "id outside": inside("top_ids", "<i4", 320),
    "id negative": inside("top_ids", "<i4", -1),
    "probability above 1": inside("top_logprobs", "<f2", 0.5),
    "probability NaN": inside("top_logprobs", "<f2", float("nan")),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_report_is_refused(report: EvaluationReport, tmp_path: Path, name: str) -> None:
    data = json.loads(report.to_bytes())
    CORRUPTIONS[name](data)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputRefused) as caught:
        EvaluationReport.read(path)
    assert caught.value.exit_code == 3
    if name == "newer":
        assert "use qtool >=" in caught.value.line()


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"kind": "evaluation", "kind": "x"}', b"[" * 100000, b"9" * 9999],
)
def test_bytes_that_are_no_report_are_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text)
    with pytest.raises(InputRefused):
        EvaluationReport.read(path)


def test_a_number_too_large_is_refused(report: EvaluationReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    text = report.to_bytes().decode()
    path.write_text(text.replace(f'"perplexity": {report.perplexity}', '"perplexity": 1e999'))
    with pytest.raises(InputRefused):
        EvaluationReport.read(path)
