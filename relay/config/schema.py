"""The JSON Schema of the file, for editors: what is built, shorthand forms included, defaults as a person would write them.

It accepts what the program accepts as far as a schema can tell; names, addresses and networks only `relay check` can judge. Pure.
"""

from typing import Any, Final

from relay.config.model import Config

_FOREIGN: Final = ("title", "gt", "ge")  # names of classes, and bounds that pydantic writes in its own words
_UNITS: Final = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def json_schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    schema: dict[str, Any] = _tidied(Config.model_json_schema(mode="validation", by_alias=True))
    schema["required"] = ["upstreams", "routes"]
    schema["properties"]["upstreams"]["minProperties"] = 1
    schema["properties"]["routes"]["minItems"] = 1
    schema["$defs"]["Route"]["oneOf"] = [{"required": ["upstream"]}, {"required": ["reject"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "relay configuration", **schema}


def _tidied(node: Any) -> Any:
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidy = {key: value for key, value in node.items() if key not in _FOREIGN or isinstance(value, dict)}
    if tidy.get("type") != "string" and isinstance(least := tidy.pop("minLength", None), int) and tidy.get("type") == "array":
        tidy["minItems"] = least
    if isinstance(tidy.get("default"), dict | list) or tidy.get("default", "") is None:
        del tidy["default"]
    if isinstance(tidy.get("default"), float) and "pattern" in tidy:
        tidy["default"] = _duration(tidy["default"])
    if tidy.get("type") == "string" and not tidy.keys() & {"pattern", "const", "enum"}:
        tidy["type"] = ["string", "number"]  # an unquoted 2024 is text where text is wanted
    return {key: _tidied(value) for key, value in tidy.items()}


def _duration(seconds: float) -> str:
    return next(f"{seconds / size:g}{unit}" for unit, size in _UNITS if seconds % size == 0)
