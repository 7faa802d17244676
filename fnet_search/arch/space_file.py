"""Reads and writes macroarchitectures as TOML files."""

import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import tomli_w

from fnet_search.arch.layers import KINDS, Layer
from fnet_search.arch.macroarchitecture import INPUT, LayerError, Macroarchitecture, Node
from fnet_search.base import shipped
from fnet_search.base.errors import FnetError, nearest, unknown
from fnet_search.base.toml_tables import IntPair, build, is_int

KEYS = ("name", "description", "input", "mean", "std", "weights", "layer")
"""Keys that a space file may have."""


def read_space(name: str) -> Macroarchitecture:
    """A shipped space by name, or a space file by path; without its weights.

    Raises FnetError for a malformed space, with the layer and its line where a layer is wrong.
    """
    path = shipped.find("spaces", "space", name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FnetError(f"cannot read space {path}: {error}") from None
    return parse_space(text, str(path), path.stem)


def parse_space(text: str, path: str = "space", default_name: str = "") -> Macroarchitecture:
    """A space from TOML text as `to_toml` writes it. `path` names it in messages. Raises FnetError as `read_space`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FnetError(f"cannot read space {path}: {error}") from None
    unknown_key = next((key for key in table if key not in KEYS), None)
    if unknown_key:
        raise FnetError(f"{path}: unknown key {unknown_key!r}{nearest(unknown_key, KEYS)}")
    texts = [table.get("name", default_name), table.get("description", ""), table.get("weights", "")]
    if not all(isinstance(value, str) for value in texts) or not (texts[0] + texts[2]).isprintable():
        raise FnetError(f"{path}: name, description and weights must be strings, name and weights without line breaks")
    if Path(texts[2]).name != texts[2]:
        raise FnetError(f"{path}: weights must be the name of a file in the same folder, not {texts[2]!r}")
    moments = [table.get(key, []) for key in ("mean", "std")]
    if not all(
        isinstance(values, list) and all(is_int(n) or isinstance(n, float) for n in values) for values in moments
    ):
        raise FnetError(f"{path}: mean and std must be lists of numbers, one per channel")
    shape, layers = table.get("input"), table.get("layer")
    if not isinstance(shape, list) or len(shape) != 3 or not all(is_int(n) and n > 0 for n in shape):
        raise FnetError(f"{path}: input must be three positive integers, as in: input = [3, 32, 32]")
    if not isinstance(layers, list) or not layers or not all(isinstance(entry, dict) for entry in layers):
        raise FnetError(f"{path}: a space needs [[layer]] tables, at least one")
    try:
        nodes = tuple(_nodes(layers))
        size = shape[0], shape[1], shape[2]
        return Macroarchitecture(texts[0], size, nodes, texts[1], tuple(moments[0]), tuple(moments[1]))
    except LayerError as fault:
        lines = [
            number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(("[[layer]]", "{"))
        ]
        place = f", line {lines[fault.position]}" if len(lines) == len(layers) else ""
        raise FnetError(f"{path}{place}: {fault}") from None
    except FnetError as error:
        raise FnetError(f"{path}: {error}") from None


def _nodes(layers: list[dict[str, Any]]) -> Iterator[Node]:
    before = INPUT
    for index, entry in enumerate(layers):
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            raise LayerError(index, "?", 'needs a name, as in: name = "conv_1"')
        try:
            yield Node(name, _layer(entry), _sources(entry, before))
        except FnetError as error:
            raise LayerError(index, name, str(error)) from None
        before = name


def _sources(entry: dict[str, Any], before: str) -> tuple[str, ...]:
    sources = entry.get("inputs", [before])
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise FnetError(f'inputs must be a list of layer names, as in: inputs = ["{before}"]')
    return tuple(sources)


def _layer(entry: dict[str, Any]) -> Layer:
    kind = entry.get("kind")
    if kind is None:
        raise FnetError(f"needs a kind: {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown("layer kind", str(kind), KINDS)
    options = {key: value for key, value in entry.items() if key not in ("name", "kind", "inputs")}
    return build(KINDS[kind], options, f"a {kind} layer")


def to_toml(space: Macroarchitecture) -> str:
    """The TOML text of a space: ``input``, then one ``layer`` per line. Options at their defaults are left out, and
    ``inputs`` if it is the layer before."""
    layers: list[dict[str, Any]] = []
    before = INPUT
    for node in space.nodes:
        entry: dict[str, Any] = {"name": node.name, "kind": node.layer.kind}
        for option in fields(node.layer):
            value = getattr(node.layer, option.name)
            if value != option.default:
                pair = option.type in (IntPair, IntPair | None)
                entry[option.name] = value[0] if pair and value[0] == value[1] else value
        if node.inputs != (before,):
            entry["inputs"] = list(node.inputs)
        layers.append(entry)
        before = node.name
    head = tomli_w.dumps({"name": space.name, "description": space.description})
    moments = "".join(f"{key} = {list(value)}\n" for key, value in (("mean", space.mean), ("std", space.std)) if value)
    return f"{head}input = {list(space.input_shape)}\n{moments}\n{tomli_w.dumps({'layer': layers})}"
