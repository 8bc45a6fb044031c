"""What is wrong with the body of a request, in plain words, from the errors that pydantic reports.

For a field with several forms pydantic reports one error for each form, and names the forms in the location. Here the
location is what the client sent, and the error is that of the form that fits best.
"""

from typing import Any

NOT_SUPPORTED = {
    "logit_bias": "logit_bias is not supported: leave it out",
    "presence_penalty": "presence_penalty is not supported: leave it out, or set it to 0",
    "frequency_penalty": "frequency_penalty is not supported: leave it out, or set it to 0",
    "suffix": "suffix is not supported: write the whole text into the prompt",
    "best_of": "best_of is not supported: ask for several completions with n, and choose yourself",
    "functions": "functions is OpenAI's older form: use tools",
    "function_call": "function_call is OpenAI's older form: use tools, tool_choice and tool_calls",
    "modalities": "the models here write text only: leave modalities out",
    "audio": "the models here write text only: leave audio out",
    "web_search_options": "there is no web search: leave web_search_options out",
}
"""Fields of OpenAI's API that change the reply and that this server cannot follow."""

EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "string_too_short": "a string of at least {min_length} characters",
    "string_too_long": "a string of at most {max_length} characters",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_pattern_mismatch": "a string that matches {pattern}",
}
JSON_TYPES = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def explain(errors: list[dict], body: Any) -> tuple[str, str | None]:
    """(message, location such as messages.0.content or None) of the fault that the client should mend first."""
    paths = [client_path(error, body) for error in errors]
    for path, error in zip(paths, errors):
        if path and path[0] in NOT_SUPPORTED and error["type"] != "missing":
            return NOT_SUPPORTED[path[0]], path[0]
    first_field = paths[0][:2] if paths[0][:1] == ["messages"] else paths[0][:1]
    same_field = [i for i, path in enumerate(paths) if path[: len(first_field)] == first_field]
    depth = max(len(paths[i]) for i in same_field)
    deepest = [i for i in same_field if len(paths[i]) == depth]
    path = paths[deepest[0]]
    location = ".".join(map(str, path)) or None
    return sentence([errors[i] for i in deepest if paths[i] == path], path, location or "the body"), location


def client_path(error: dict, body: Any) -> list:
    """The keys and positions of the error's location that are in the body, and the key that is missing there."""
    path, value = [], body
    parts = error["loc"][1:]
    for i, part in enumerate(parts):
        is_missing_key = error["type"] == "missing" and i == len(parts) - 1
        if has_entry(value, part):
            value = value[part]
        elif not is_missing_key:
            continue  # the name of a form
        path.append(part)
    return path


def has_entry(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def sentence(errors: list[dict], path: list, where: str) -> str:
    first = errors[0]
    value = first.get("input")
    if first["type"] == "value_error":
        text = first["msg"].removeprefix("Value error, ")
        return f"{where}: {text}" if path else text
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "extra_forbidden":
        return f"{where} is not a field that this server knows"
    if path[-1:] == ["type"] and "content" in path:
        return f"{where}: content of the type {value!r:.40} is not supported: the models here read text only"
    expected = []
    for error in errors:
        template = EXPECTED.get(error["type"], "another value")
        expected.append(template.format(**error.get("ctx", {})))
    received = "null" if value is None else JSON_TYPES.get(type(value), "another value")
    if first["type"] not in ("literal_error",) and first["type"].endswith(("_type", "_required", "_from_float")):
        return f"{where}: expected {' or '.join(dict.fromkeys(expected))}, got {received}"
    return f"{where}: expected {' or '.join(dict.fromkeys(expected))}, got {value!r:.60}"
