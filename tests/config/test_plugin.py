from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import pytest

from ps_elastic.config.plugin import Plugin, one_line, resolve, state
from ps_elastic.config.sources import gather
from ps_elastic.errors import ConfigError
from ps_elastic.policies import Policy


@dataclass
class Rule(Policy):
    bound: int = 4
    sizes: list[int] = field(default_factory=lambda: [1])
    label: str = "a"
    limit: float | None = None
    seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise ValueError("bound is negative")

    def on_push(self, push: Any, ledger: Any) -> Any:
        return ()


@dataclass
class Unfinished(Policy):
    @abstractmethod
    def more(self) -> None: ...


@dataclass
class Greedy(Rule):
    name: str = "mine"


@dataclass
class Stranger:
    bound: int = 4


RULE = f"{__name__}:Rule"


def problems(name: Any, **settings: Any) -> list[tuple[str, str]]:
    return [(problem.key, problem.message) for problem in resolve("policy", {"name": name, **settings})[1]]


def test_settings_are_stated_in_full_and_the_text_only_what_differs() -> None:
    plugin, found = resolve("policy", {"name": RULE, "bound": 3.0, "label": "a", "limit": 1})
    assert found == []
    assert plugin == Plugin("policy", RULE, {"bound": 3, "sizes": [1], "label": "a", "limit": 1.0})
    assert plugin.text() == f"{RULE}:bound=3:limit=1.0"
    assert plugin.to_dict() == {"name": RULE, "bound": 3, "sizes": [1], "label": "a", "limit": 1.0}


def test_each_build_is_a_new_instance_that_shares_no_list() -> None:
    plugin, _ = resolve("policy", {"name": RULE, "bound": 3})
    first, second = plugin.build(), plugin.build()
    assert type(first) is Rule
    assert first == second == Rule(bound=3)
    assert first.sizes is not second.sizes
    first.sizes.append(2)
    assert plugin.build().sizes == [1]


@pytest.mark.parametrize(
    "settings",
    [
        {"bound": 7, "sizes": [1, 2]},
        {"label": "true"},
        {"label": "1e-4"},
        {"label": ""},
        {"label": "#x"},
        {"limit": 1e-9},
        {},
    ],
)
def test_the_one_line_form_reads_back_the_same(settings: dict[str, Any]) -> None:
    plugin, _ = resolve("policy", {"name": RULE, **settings})
    again, found = resolve("policy", gather({"policy": plugin.text()}, ()).tree["policy"])
    assert (again, found) == (plugin, [])


def test_a_plugin_left_as_written_keeps_what_was_stated_unchecked() -> None:
    plugin, found = state("task", {"name": "nowhere:Task", "x": "1", "shared": 2}, ["shared"])
    assert (plugin, found) == (Plugin("task", "nowhere:Task", {"x": "1"}), [])
    assert plugin.text() == 'nowhere:Task:x="1"'
    assert [problem.key for problem in state("task", {"name": 3})[1]] == ["name"]


def test_keys_of_the_section_are_not_settings_of_the_plugin() -> None:
    plugin, found = resolve("policy", {"name": RULE, "accumulate": 3}, ["accumulate"])
    assert found == []
    assert "accumulate" not in plugin.settings
    _, found = resolve("policy", {"name": RULE, "acumulate": 3}, ["accumulate"])
    assert "nearest 'accumulate'" in found[0].message


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    ((key, message),) = problems("stale_synchronus")
    assert key == "name"
    assert message.startswith("unknown policy 'stale_synchronus'; nearest 'stale_synchronous'; known: asgrad, ")


def test_an_unknown_setting_is_refused_with_the_nearest_and_the_plugin() -> None:
    expected = f"unknown key of policy {RULE} 'bond'; nearest 'bound'; known: bound, label, limit, name, sizes"
    assert problems(RULE, bond=3) == [("bond", expected)]


def test_state_is_no_setting() -> None:
    assert [key for key, _ in problems(RULE, seen=3)] == ["seen"]


def test_wrong_types_are_refused_saying_got_and_expected() -> None:
    assert problems(RULE, bound="many") == [("bound", "got 'many', expected a whole number")]
    assert problems(RULE, sizes=3) == [("sizes", "got 3, expected [a whole number]")]
    assert problems(3) == [("name", "got 3, expected text")]


def test_the_checks_of_the_class_are_problems_of_the_section() -> None:
    assert problems(RULE, bound=-1) == [("", "bound is negative")]
    assert problems("first_k", k=0) == [("k", "got 0, expected a number of workers >= 1")]


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("no_such_module:Rule", "name", "no module 'no_such_module'"),
        (f"{__name__}:Nobody", "name", "has no class 'Nobody'"),
        (f"{__name__}:Stranger", "name", "got class Stranger, expected a subclass of ps_elastic.policies.Policy"),
        (f"{__name__}:Unfinished", "name", "class Unfinished lacks more, on_push"),
        (f"{__name__}:Greedy", "name", "class Greedy has a setting of that name"),
    ],
)
def test_a_class_that_cannot_serve_is_refused_by_name(name: str, key: str, message: str) -> None:
    ((found_key, found_message),) = problems(name)
    assert found_key == key
    assert message in found_message


def test_every_problem_of_a_plugin_is_found() -> None:
    assert {key for key, _ in problems(RULE, bound="x", limit="y", lable="z")} == {"bound", "limit", "lable"}


def test_an_error_in_the_code_of_a_plugin_is_not_hidden(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "broken_rules.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        resolve("policy", {"name": "broken_rules:Rule"})


def test_one_line_form_of_plain_values() -> None:
    assert (
        one_line("x", {"a": 0.01, "b": None, "c": False, "d": "text", "e": (1, 2)})
        == "x:a=0.01:b=null:c=false:d=text:e=[1, 2]"
    )


def test_a_built_plugin_is_refused_like_a_resolved_one() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'nobody'"):
        Plugin("policy", "nobody", {}).build()
