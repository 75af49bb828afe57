from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import Images, OddModel, Point
from safetensors.torch import load_file, save_file
from torch import nn

from ps_elastic.config.load import load
from ps_elastic.errors import ConfigError
from ps_elastic.records.checkpoint import load_parameters
from ps_elastic.records.run_dir import write_json
from ps_elastic.records.writer import RunWriter, environment
from ps_elastic.vectors.layout import Layout


def saved(model: nn.Module, folder: Path) -> str:
    RunWriter(folder, 0).write_model(model)
    return str(folder / "model.safetensors")


def test_every_rank_has_its_metrics_and_rank_0_the_rest(tmp_path: Path) -> None:
    config = load({"task": "digits"})
    for rank in range(3):
        record = RunWriter(tmp_path, rank)
        record.tracker.note("reply", 0.5, step=rank)
        if rank == 0:
            record.events().write('{"event": "done"}')
            record.write_setting(config, 2, transport="in process")
            record.write_summary({"exit": 0})
        record.close()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "metrics/rank-000.jsonl", "metrics/rank-001.jsonl", "metrics/rank-002.jsonl", "events.jsonl", "config.yaml",
        "env.json", "summary.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "metrics" / "rank-002.jsonl").read_text())["rank"] == 2
    assert load(tmp_path / "config.yaml") == config
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["workers"] == 2 and env["transport"] == "in process" and env["versions"]["torch"]


def test_lines_wait_no_longer_than_a_second_while_nothing_else_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    record = RunWriter(tmp_path, 0)
    events, metrics = tmp_path / "events.jsonl", tmp_path / "metrics" / "rank-000.jsonl"
    record.events().write('{"event": "push"}')
    record.tracker.later(lambda: '{"event": "used"}')
    record.rest()
    assert events.read_text() == metrics.read_text() == ""
    clock[0] = 1.5
    record.rest()
    assert (events.read_text(), metrics.read_text()) == ('{"event": "push"}\n', '{"event": "used"}\n')
    record.close()


def test_the_environment_names_versions_machine_and_threads() -> None:
    found = environment()
    assert {"versions", "host", "platform", "processor", "cores", "threads", "command"} <= found.keys()
    assert {"ps_elastic", "python", "torch", "numpy"} <= found["versions"].keys()
    json.dumps(found, allow_nan=False)


def test_a_reader_never_sees_half_a_document(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_model_is_saved_with_its_statistics_and_tied_tensors_once(tmp_path: Path) -> None:
    images = load_file(saved(Images().model(0), tmp_path / "images"))
    assert images.keys() == Images().model(0).state_dict().keys()
    odd = load_file(saved(OddModel(), tmp_path / "odd"))
    assert odd.keys() == OddModel().state_dict().keys() - {"again.weight"}


def test_a_model_that_is_loaded_is_the_one_that_was_saved(tmp_path: Path) -> None:
    for number, make in enumerate((Images().model, lambda seed: OddModel())):
        first, second = make(1), make(2)
        load_parameters(second, saved(first, tmp_path / str(number)))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


class Scaled(Point):
    """Its constant is no part of its state."""

    def __init__(self, constant: float) -> None:
        super().__init__(torch.zeros(2))
        self.register_buffer("constant", torch.tensor(constant), persistent=False)


def test_a_model_is_written_from_where_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(500, 300), nn.Linear(300, 500))
    layout = Layout(model)
    layout.attach(model, layout.empty())
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        RunWriter(tmp_path, 0).write_model(model)
    assert max([event.cpu_memory_usage for event in profile.function_events], default=0) < layout.size
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.named_parameters())


def test_a_buffer_that_is_not_persistent_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    path = saved(Scaled(1.0), tmp_path)
    assert load_file(path).keys() == {"x"}
    model = Scaled(2.0)
    load_parameters(model, path)
    assert float(model.get_buffer("constant")) == 2.0
    save_file({"x": torch.zeros(2), "constant": torch.tensor(1.0)}, path)
    with pytest.raises(ConfigError, match=r"has \['constant'\]"):
        load_parameters(model, path)


def test_a_file_may_leave_the_buffers_out(tmp_path: Path) -> None:
    model = Images().model(0)
    path = str(tmp_path / "init.safetensors")
    save_file({name: p.detach() + 1 for name, p in model.named_parameters()}, path)
    other = Images().model(0)
    load_parameters(other, path)
    assert all(torch.equal(a + 1, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_file_that_does_not_fit_is_refused_by_key_and_name(tmp_path: Path) -> None:
    path, model = str(tmp_path / "init.safetensors"), Point(torch.zeros(2))

    def refusal() -> str:
        with pytest.raises(ConfigError) as error:
            load_parameters(model, path)
        assert error.value.exit_code == 2
        return str(error.value)

    assert refusal() == f"train.init: no file '{path}'"
    Path(path).write_bytes(b"not tensors")
    assert refusal().startswith(f"train.init: '{path}' is not a safetensors file: ")
    save_file({"x": torch.zeros(3)}, path)
    assert refusal() == f"train.init: '{path}': 'x' is (3,), expected (2,)"
    save_file({"y": torch.zeros(2)}, path)
    assert refusal() == f"train.init: '{path}' lacks ['x'] and has ['y']; expected the names of the model"
    save_file({"x": torch.zeros(2), "y": torch.zeros(2)}, path)
    assert refusal() == f"train.init: '{path}' lacks [] and has ['y']; expected the names of the model"
    Path(path).unlink()
    Path(path).mkdir()
    assert refusal().startswith(f"train.init: '{path}' is not a safetensors file: ")
