"""Logits of the last token unless asked for more: the same graph serves and is scored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.runtime.ort import OrtSession
from qtool.runtime.session import last_logits


def run(folder: Path, ids: np.ndarray, **more: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **more}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((ids.shape[0], value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


@pytest.fixture
def package(tiny_model, source_of, quantize, export) -> Path:
    source = source_of(tiny_model("llama"))
    return export(quantize(source, layer_scheme("W4A8", group_size=32)), source, last_logits=True)[0]


def test_plain_runtime_gets_one_row_and_any_number_on_request(package, ids):
    every = run(package, ids, logits_from=np.array([0]))
    assert every.shape == (2, 24, 320) and run(package, ids).shape == (2, 1, 320)
    np.testing.assert_array_equal(run(package, ids)[:, 0], every[:, -1])
    np.testing.assert_array_equal(run(package, ids, logits_from=np.array([-5])), every[:, -5:])
    onnx.checker.check_model(str(package / "model.onnx"))


def test_session_scores_all_and_answers_the_last(package, ids):
    with OrtSession(package, threads=1, max_length=64) as session:
        every = session.prefill(ids[:1])
        assert every.shape == (1, 24, 320)
        np.testing.assert_allclose(every, run(package, ids[:1], logits_from=np.array([0])), atol=1e-5)
        session.reset()
        np.testing.assert_array_equal(last_logits(session, ids[:1]), every[:, -1])
        step = session.decode(ids[0, :1]).copy()
        again = session.prefill(ids[1:, :3])  # after a step, all rows again
        session.reset()
        whole = session.prefill(np.concatenate([ids[:1], ids[:1, :1], ids[1:, :3]], axis=1))
        np.testing.assert_allclose(np.concatenate([step, again[0]]), whole[0, 24:], atol=0.05)  # a code that flips
        assert (np.concatenate([step, again[0]]).argmax(-1) == whole[0, 24:].argmax(-1)).mean() >= 0.75


def test_genai_takes_the_last_row_as_it_is(package, ids):
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(package))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=32)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids[0].astype(np.int32))
    logits = generator.get_output("logits")
    assert logits.shape == (1, 1, 320)
    np.testing.assert_allclose(logits[0, 0], run(package, ids[:1])[0, 0], atol=1e-5)
    generator.generate_next_token()
    assert int(generator.get_sequence(0)[-1]) == int(logits[0, 0].argmax())


def test_without_the_option_the_graph_hands_out_all(tiny_model, source_of, quantize, export, ids):
    source = source_of(tiny_model("llama"))
    folder, details = export(quantize(source, layer_scheme("W4A8", group_size=32)), source)
    assert details["logits"] == "all" and run(folder, ids).shape == (2, 24, 320)
    names = {i.name for i in onnx.load(folder / "model.onnx", load_external_data=False).graph.input}
    assert "logits_from" not in names


def test_optimized_graph_has_ten_nodes_a_layer_and_nothing_dead(package, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(str(package / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    a_layer = {"MatMulNBits": 4, "GroupQueryAttention": 1, "Split": 1, "QuickGelu": 1, "Mul": 1}
    norms = {"RMSNormalization": 1, "SkipSimplifiedLayerNormalization": 2 * 2}
    lengths = {"Shape": 1, "Gather": 1, "ReduceSum": 1, "Sub": 1, "Cast": 2}  # once for all layers
    ends = {"GatherBlockQuantized": 1, "Slice": 1}
    wanted = Counter({name: 2 * count for name, count in a_layer.items()}) + Counter(norms | lengths | ends)
    wanted["MatMulNBits"] += 1  # the head
    assert Counter(node.op_type for node in graph.node) == wanted
