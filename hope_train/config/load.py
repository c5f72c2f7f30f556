"""Reading a configuration: defaults < file < `key=value` overrides; errors name the nearest right key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hope_train.config.base import Section
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError

SectionT = TypeVar("SectionT", bound=Section)


# pydantic's words for what goes wrong most often, without its type names.
_PLAIN = {
    "model_type": "a section is wanted here, with keys below it",
    "tuple_type": "a list is wanted here, as in [a, b]",
    "string_type": "text is wanted here; put numbers and dates between quotes",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string, where people mean the number, and takes the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is there twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML, with `1e-3` and `100e9` as numbers. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration in YAML file `path` with `key.sub=value` overrides on top.

    A file may say `base: other.yaml` (relative to itself): it is then laid over that file.
    Raises UserError for a missing file, bad YAML, unknown keys and bad values.
    """
    tree = read_tree(Path(path))
    for text in overrides:
        apply_override(tree, text)
    return validate(RunConfig, tree, origin=str(path))


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The raw mapping in a YAML file, its `base` files merged below it."""
    if not path.is_file():
        raise UserError(f"no configuration file {path}{_near_file(path)}")
    if path.resolve() in seen:
        raise UserError(f"{path}: `base` goes round in a circle")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"{path}: not valid YAML: {reason}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys, this is a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return merge(read_tree(path.parent / str(base), (*seen, path.resolve())), tree)


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mappings key by key; lists and scalars are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set `a.b.c=value` in a raw tree, in place; a number in the path is an index into a list."""
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise UserError(f"override {text!r} is not of the form key=value")
    try:
        parsed = parse_yaml(value) if value else None
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: the value is not valid YAML") from None
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"override {text!r}: {'.'.join(parts[:depth])} is a list of {len(node)} entries")
            if last:
                node[int(part)] = parsed
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = parsed
            else:
                if node.get(part) is None:
                    if parts[depth + 1].isdigit():
                        whole = ".".join(parts[: depth + 1])
                        raise UserError(f"override {text!r}: there is no list {whole} yet; set it whole, {whole}=[...]")
                    node[part] = {}
                node = node[part]
        else:
            raise UserError(f"override {text!r}: {'.'.join(parts[:depth])} is a value, not a section")


def validate(kind: type[SectionT], tree: Mapping[str, Any], origin: str = "configuration") -> SectionT:
    """Check a raw tree against a section type. Raises UserError with one line that lists every problem."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(kind, item) for item in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(problems)) from None


def dump_yaml(config: Section) -> str:
    """The resolved tree as YAML, every key written out; `load_config` reads it back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def field_docs(kind: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, str, Any, str]]:
    """Every leaf field below a section: (dotted key, type, default, documentation)."""
    for name, field in kind.model_fields.items():
        child = _section_type(field.annotation)
        key = f"{prefix}{name}"
        if child is not None:
            many = child is not field.annotation
            yield from field_docs(child, f"{key}.N." if many else f"{key}.")
        else:
            text = " ".join((field.description or "").split())
            yield key, _type_name(field.annotation) + _limits(field.metadata), field.get_default(), text


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("Literal", "one of ")


def _limits(metadata: Iterable[Any]) -> str:
    """The range and form a field's value must have, as in `, >= 0, < 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "matches"}
    found = [(sign, getattr(item, name, None)) for item in metadata for name, sign in signs.items()]
    return "".join(f", {sign} {value}" for sign, value in found if value is not None)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return None


def _describe(kind: type[BaseModel], item: Any) -> str:
    place = tuple(item["loc"])
    key = ".".join(str(part) for part in place)
    if item["type"] == "extra_forbidden":
        return f"unknown key `{key}`{_nearest(kind, place)}"
    message = _PLAIN.get(str(item["type"]), str(item["msg"]).removeprefix("Value error, "))
    if not key:
        return message
    value = item.get("input")
    shown = "" if isinstance(value, (dict, list, BaseModel)) else f" (got {value!r})"
    return f"`{key}`: {message[0].lower()}{message[1:]}{shown}"


def _nearest(root: type[BaseModel], place: tuple[Any, ...]) -> str:
    """The key the user most likely meant: this very name elsewhere in the tree, a similar one here, one elsewhere."""
    section: type[BaseModel] | None = root
    for part in place[:-1]:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = _section_type(section.model_fields[part].annotation)
    wrong = str(place[-1])
    names = list(section.model_fields) if section is not None else []
    prefix = "".join(f"{part}." for part in place[:-1])
    leaves = {key.rsplit(".", 1)[-1]: key for key, *_ in field_docs(root)}
    meant = [leaves[wrong]] if wrong in leaves else []
    meant += [prefix + name for name in difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)]
    meant += [leaves[name] for name in difflib.get_close_matches(wrong, leaves, n=1, cutoff=0.75)]
    if meant:
        return f" (did you mean `{meant[0]}`?)"
    return f" (known here: {', '.join(names)})" if names else ""


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
