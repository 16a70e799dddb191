"""Convert the prompts of the Berkeley Function-Calling Leaderboard into records with tools.

    pip download bfcl-eval --no-deps --dest checkpoints/bfcl
    python scripts/data/bfcl_records.py checkpoints/bfcl/bfcl_eval-*.whl --out checkpoints/bfcl

Writes `prompts.jsonl`, whose questions `python -m data.regenerate` answers, and `calls.jsonl`, in which the answers are
the benchmark's own calls. Both go through `python -m data.report` like any other data. Turns in which functions become
available later see all functions from the start. License of the data: Apache-2.0.
"""

import argparse
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = "bfcl_eval/data/"
DOCS = {  # classes of the multi-turn categories: files with their functions
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MemoryAPI": "memory_kv",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
    "WebSearchAPI": "web_search",
}
TYPES = {  # the benchmark's names of types, from Python, Java and JavaScript, in JSON schema
    "object": ("dict", "HashMap", "Hashtable", "object"),
    "array": ("array", "tuple", "list", "ArrayList", "Array", "Queue", "Stack", "set"),
    "string": ("string", "String", "char", "Bigint", "BigInt"),
    "number": ("number", "float", "double", "Double", "Float"),
    "integer": ("integer", "int", "long", "short", "byte", "Integer", "Long"),
    "boolean": ("boolean", "Boolean", "bool"),
    "null": ("null",),
}
JSON_TYPE = {name: schema for schema, names in TYPES.items() for name in names}
ANY = ("any", "Any", "")  # every value is valid


def main() -> None:
    """Convert all categories and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="bfcl_eval-*.whl from PyPI")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/bfcl"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with (
        zipfile.ZipFile(args.wheel) as wheel,
        (args.out / "prompts.jsonl").open("w", encoding="utf-8") as prompts,
        (args.out / "calls.jsonl").open("w", encoding="utf-8") as calls,
    ):
        for category, record, answer in _records(wheel):
            prompts.write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[category] += 1
            if answer:
                calls.write(json.dumps(record | {"messages": record["messages"] + [answer]}, ensure_ascii=False) + "\n")
                counts["with calls"] += 1
    for category, count in counts.items():
        print(f"{count:6,} {category}")
    print(f"{counts.total() - counts['with calls']:6,} prompts\n{args.out}")


def _records(wheel: zipfile.ZipFile) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Yield the category, the record and, if the benchmark gives the calls of a single turn, the answer."""
    docs = {name: _lines(wheel, f"multi_turn_func_doc/{file}.json") for name, file in DOCS.items()}
    present = set(wheel.namelist())
    for path in sorted(present):
        category = path.removeprefix(f"{DATA}BFCL_v4_").removesuffix(".json")
        if "/" in category or category == "format_sensitivity":
            continue
        answers = f"possible_answer/BFCL_v4_{category}.json"
        truth = {a["id"]: a["ground_truth"] for a in _lines(wheel, answers)} if DATA + answers in present else {}
        for prompt in _lines(wheel, f"BFCL_v4_{category}.json"):
            functions = prompt.get("function") or [f for name in prompt.get("involved_classes", ()) for f in docs[name]]
            excluded = prompt.get("excluded_function", ())
            tools = [_tool(f) for f in functions if f["name"] not in excluded]
            messages = [message for turn in prompt["question"] for message in turn]
            record = {"id": prompt["id"], **({"tools": tools} if tools else {}), "messages": messages}
            single = len(prompt["question"]) == 1 and not prompt.get("involved_classes")
            yield category, record, _answer(truth.get(prompt["id"])) if single else None


def _lines(wheel: zipfile.ZipFile, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in wheel.read(DATA + file).decode().splitlines() if line.strip()]


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    kept = {key: function[key] for key in ("name", "description") if key in function}
    return {"type": "function", "function": kept | {"parameters": _schema(function["parameters"])}}


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with the types of JSON schema. Raise a KeyError for an unknown type."""
    converted = dict(schema)
    if "type" in schema:
        del converted["type"]
        if schema["type"] not in ANY:
            converted = {"type": JSON_TYPE[schema["type"]], **converted}
    if isinstance(schema.get("properties"), dict):
        converted["properties"] = {name: _schema(value) for name, value in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        converted["items"] = _schema(schema["items"])
    return converted


def _answer(truth: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    if not truth:
        return None
    calls = [{"function": {"name": name, "arguments": _arguments(a)}} for call in truth for name, a in call.items()]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _arguments(allowed: dict[str, list[Any]]) -> dict[str, Any]:
    """Choose the first allowed value of each argument; an argument whose first one is an empty text is left out."""
    return {name: _value(values[0]) for name, values in allowed.items() if values and values[0] != ""}


def _value(value: Any) -> Any:
    if isinstance(value, dict):  # its values are lists of allowed values again
        return {key: _value(v[0]) if isinstance(v, list) and v else v for key, v in value.items()}
    return [_value(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
