from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_elastic.config.sources import gather, read_yaml
from ps_elastic.errors import ConfigError


def tree(source: Any, *overrides: str) -> dict[str, Any]:
    return gather(source, overrides).tree


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_command_line_goes_over_the_file() -> None:
    source = {"train": {"samples": 10, "init": "a"}, "seed": 1}
    assert tree(source, "train.samples=20", "seed=2")["train"] == {"samples": 20, "init": "a"}
    assert tree(source, "seed=2", "seed=3")["seed"] == 3


def test_a_mapping_given_is_not_changed() -> None:
    source = {"train": {"samples": 10}}
    tree(source, "train.samples=20")
    assert source == {"train": {"samples": 10}}


def test_a_section_may_be_written_in_one_line() -> None:
    expected = {"name": "top_k", "ratio": 0.1, "error_feedback": False}
    assert tree({"compressor": "top_k:ratio=0.1:error_feedback=false"})["compressor"] == expected
    assert tree({}, "compressor=top_k:ratio=0.1:error_feedback=false")["compressor"] == expected
    assert tree({}, "compressor.name=top_k:ratio=0.1", "compressor.error_feedback=false")["compressor"] == expected
    assert tree({"policy": "my.rules:Mine:bound=3"})["policy"] == {"name": "my.rules:Mine", "bound": 3}


def test_another_name_drops_the_settings_of_the_former_but_not_those_of_the_section() -> None:
    source = {"compressor": "top_k:ratio=0.1:error_feedback=false", "policy": "stale_synchronous:bound=9"}
    assert tree(source, "compressor=identity")["compressor"] == {"name": "identity", "error_feedback": False}
    assert tree(source, "policy=synchronous")["policy"] == {"name": "synchronous"}
    assert tree(source, "policy=stale_synchronous")["policy"] == {"name": "stale_synchronous", "bound": 9}
    assert tree({"optimizer": {"momentum": 0.9, "lr": 1}}, "optimizer=adam")["optimizer"] == {"name": "adam", "lr": 1}


def test_settings_on_the_command_line_may_come_before_the_name() -> None:
    assert tree({}, "policy.bound=3", "policy=stale_synchronous")["policy"] == {"name": "stale_synchronous", "bound": 3}
    assert tree({}, "policy=first_k:k=3", "policy=synchronous")["policy"] == {"name": "synchronous"}


def test_null_gives_a_section_its_default_name() -> None:
    assert tree({"policy": None})["policy"] == {"name": "synchronous"}
    assert tree({"policy": "first_k:k=3"}, "policy=null")["policy"] == {"name": "synchronous"}


@pytest.mark.parametrize("text", ["policy", "=3", "policy.=3", ".bound=3", ""])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value") as caught:
        tree({}, text)
    assert caught.value.source == "command line"


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("seed=[1", "seed", "not YAML"),
        ("seed=!!str 3", "seed", "got tag '!!str'"),
        ("policy=3", "policy", "got 3, expected a name"),
        ("policy=a:b:c", "policy", "expected key=value, got 'c'"),
        ("policy=first_k:k=[", "policy.k", "not YAML"),
        ("policy={name: 'first_k:k=2', k: 3}", "policy.k", "stated twice"),
        ("faults={1: 2}", "faults", "got the key 1, expected text"),
    ],
)
def test_a_bad_override_is_named_by_its_key(override: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tree({}, override)
    assert (caught.value.key, caught.value.source) == (key, "command line")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: digits\nseed: !!python/object:os.system 1\n", "line 2: got tag '!!python/object:os.system'"),
        ("task: !!str digits", "line 1: got tag '!!str'"),
        ("task: !mine {a: 1}", "line 1: got tag '!mine'"),
        ("seed: 1\nseed: 2\n", 'line 2: not YAML: found duplicate key "seed"'),
        ("task: [1", "not YAML"),
        ("task: *nobody", "line 1: not YAML: found undefined alias"),
        ("a: &a [*a]", "an alias stands inside its own anchor"),
        ("- task", "got ['task'], expected a mapping of keys"),
        ("digits", "got 'digits', expected a mapping of keys"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: \x00", "not YAML"),
        ("a: ._", "not YAML: could not convert"),
        (b"name: \xff", "not text in UTF-8: invalid start byte at byte 6"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused_by_name(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        tree(path)
    assert message in caught.value.message
    assert caught.value.source == str(path)


def test_a_file_that_is_not_there_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot read it: No such file"):
        tree(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="cannot read it: Is a directory"):
        tree(tmp_path)


def test_an_empty_file_states_nothing(tmp_path: Path) -> None:
    assert tree(written(tmp_path, "")) == tree(written(tmp_path, "# only a comment\n")) == tree({})


def test_anchors_are_shared_values_and_not_shared_objects() -> None:
    value = read_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert value == {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [1], "y": 2}}
    assert value["a"]["x"] is not value["b"]["x"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e5", 3e5),
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-31", "2024-01-31"),
        ("2024-99-99", "2024-99-99"),
        ("=", "="),
        ("<<", "<<"),
        ("010", 10),
        ("12:30", "12:30"),
        ("'1'", "1"),
        ("", None),
        ("accuracy>=0.9", "accuracy>=0.9"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert read_yaml(text) == value


@given(st.text(max_size=30) | st.text("!&*-:{}[],#|>\"'%@`? \n\tab01.=<", max_size=12))
def test_any_text_is_a_plain_value_or_a_config_error(text: str) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, (str, int, float, type(None)))

    try:
        value = read_yaml(text)
    except ConfigError:
        return
    assert plain(value)


def test_blame_names_the_file_or_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "task: digits\ntrain: {samples: 1, init: a}\n")
    found = gather(path, ["train.samples=2", "policy=first_k:k=2"])
    sources = {key: found.blame(ConfigError("wrong", key=key)).source for key in ("train.init", "train.samples")}
    assert sources == {"train.init": str(path), "train.samples": "command line"}
    assert found.blame(ConfigError("wrong", key="policy.k")).source == "command line"
    assert found.blame(ConfigError("wrong", key="policy.name")).source == "command line"
    assert found.blame(ConfigError("wrong", key="seed")).source == str(path)
    assert found.blame(ConfigError("wrong", key="train")).source == f"{path} and command line"
