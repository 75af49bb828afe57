"""The JSON Schema of a configuration (draft 2020-12), for editors that complete and check a file while it is written.

It says of each key by itself what `load` says of it; what does not go together, `config validate` alone can tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ps_elastic.config.describe import meanings
from ps_elastic.config.load import HOLDERS, PLUGINS
from ps_elastic.config.plugin import load_class, registry
from ps_elastic.config.schema import Config
from ps_elastic.config.sources import NAMED
from ps_elastic.plugins import OneOf, Range, init_types, plain, ranges, settings, summary

Schema = dict[str, Any]
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", NoneType: "null"}
_BOUNDS = {">": "exclusiveMinimum", ">=": "minimum", "<": "exclusiveMaximum", "<=": "maximum"}
_CLASS = r"[\w.]+:[A-Za-z_]\w*"  # a plug-in from outside the package


def json_schema(task: str | None = None) -> Schema:
    """The schema of a file; `task`: the one task that it may name, registered or `module:Class`. Raises ConfigError."""
    properties, comments = _properties(Config), meanings(Config)
    for key in NAMED:
        section: Any = HOLDERS.get(key) or init_types(Config)[key]
        if key in PLUGINS:
            properties[key] = {"anyOf": _choice(key, task if key == "task" else None)}
        else:
            lines = {name: settings(section) for name in get_args(init_types(section)["name"])}
            line, mapping = _one_line(lines), properties[key]["anyOf"][0]["properties"]
            properties[key]["anyOf"].append(line)
            mapping["name"] = {"anyOf": [mapping["name"], line]}
        properties[key]["description"] = comments.get(key) or summary(section)
    properties["name"] |= {"type": ["string", "null"], "pattern": r"^\w[\w.-]*$"}
    made = _object(properties, summary(Config), ["task"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ps_elastic configuration", **made}


def _choice(key: str, only: str | None) -> list[Schema]:
    """The forms of a section that names a plug-in: one line, or a mapping with the settings of one of them."""
    kind, default = PLUGINS[key], NAMED[key].default
    known = {only: load_class(kind, only)} if only else dict(registry(kind).items())
    shared = _properties(HOLDERS[key]) if key in HOLDERS else {}
    shared.pop("plugin", None)
    forms: list[Schema] = []
    keys = {name: {**_properties(cls), **shared} for name, cls in known.items()}
    for name, cls in known.items():
        required = [key for key, value in settings(cls).items() if value is MISSING]
        named: Schema = {"name": {"anyOf": [{"const": name}, _one_line({name: keys[name]})]}}
        required += [] if name == default else ["name"]
        forms.append(_object({**named, **keys[name]}, summary(cls), required))
    if not only:
        forms.append(_one_line({}, rf"{_CLASS}(:\w+=[^:]*)*"))
        named = {"name": {"type": "string", "pattern": f"^{_CLASS}(:|$)"}}
        forms.append({"type": "object", "properties": {**named, **shared}, "required": ["name"]})
    return [{"enum": [*known]}, _one_line(keys), *forms, *([_of(None)] if default else [])]


def _one_line(keys: Mapping[str, Iterable[str]], *others: str) -> Schema:
    """The form `name:key=value:...`; keys: name -> its keys."""
    known = {name: "|".join(key for key in of if key != "name") for name, of in keys.items()}
    lines = [re.escape(name) + (f"(:({of})=[^:]*)*" if of else "") for name, of in known.items()]
    return {"type": "string", "pattern": f"^({'|'.join([*lines, *others])})$"}


def _object(properties: Schema, description: str, required: Sequence[str] = ()) -> Schema:
    told = {"type": "object", "description": description, "properties": properties, "additionalProperties": False}
    return {**told, "required": [*required]} if required else told


def _properties(cls: type) -> Schema:
    """key -> schema, of each setting of a dataclass."""
    comments, bounds, defaults, told = meanings(cls), ranges(cls), settings(cls), {}
    for key, hint in init_types(cls).items():
        told[key] = _of(hint, bounds.get(key))
        if key in comments:
            told[key]["description"] = comments[key]
        if defaults[key] is not MISSING and not is_dataclass(defaults[key]):
            told[key]["default"] = plain(defaults[key])
    return told


def _of(hint: Any, allowed: Range | None = None) -> Schema:
    """The schema of the type `hint`, every number of it as `allowed`."""
    origin, members = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [_of(member, allowed) for member in members]}
    if origin is Literal:
        return {"enum": list(members)}
    if origin is str and isinstance(allowed, OneOf):
        return {"enum": allowed.words}
    if origin in (None, *_TYPES):
        bounds = allowed.bounds if allowed and origin in (int, float) else {}
        return {"type": _TYPES[origin or NoneType], **{_BOUNDS[sign]: bound for sign, bound in bounds.items()}}
    if is_dataclass(origin):
        return {"anyOf": [_object(_properties(origin), summary(origin)), _of(None)]}  # type: ignore[arg-type]
    if origin is tuple and members and Ellipsis not in members:
        items = [_of(member, allowed) for member in members]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (list, tuple, Sequence):
        inner = _of(members[0], allowed) if members else {}
        if not (members and is_dataclass(members[0])):
            return {"type": "array", "items": inner}
        entry, nothing = inner["anyOf"]  # of faults: one entry, or a list of them
        return {"anyOf": [entry, {"type": "array", "items": entry}, nothing]}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _of(members[1], allowed) if members else {}}
    return {}  # another class, or anything
