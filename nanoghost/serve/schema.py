"""Bodies of requests: OpenAI's fields with limits. Unknown fields are rejected instead of being ignored."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MAX_MESSAGES = 512
MAX_TEXT = 400_000  # characters of one text
MAX_SAMPLES = 8
MAX_PROMPTS = 64
MAX_STOP_TEXTS = 8
MAX_TOOLS = 32
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA = 32_768  # characters of a JSON schema
MAX_SCHEMA_DEPTH = 24  # nested objects and lists
MAX_PATTERN = 256  # characters of a regular expression in a schema

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=129)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=131_072)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
Hint = Annotated[str, StringConstraints(max_length=512)]
Zero = Annotated[float, Field(ge=0, le=0)]  # a field of OpenAI's that is not supported: only its default is accepted


class StrictModel(BaseModel):
    """Base of all models here: rejects unknown fields, values of another type, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: Text
    parsed_arguments: Any = None
    """Added by OpenAI's client; the same as `arguments`."""


class ToolCall(StrictModel):
    id: Annotated[str, StringConstraints(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Position in a streamed message; nothing follows from it."""


def any_of(*combinations: dict) -> ConfigDict:
    """Adds to the description of the API which combinations of fields are valid: {name of a field: its schema}."""
    alternatives = []
    for properties in combinations:
        required = [name for name, schema in properties.items() if schema.get("type") != "null"]
        alternatives.append({"properties": properties, "required": required})
    return ConfigDict(json_schema_extra={"anyOf": alternatives})


CONTENT = {"content": {"type": ["string", "array"]}}
NO_TOOL_CALLS = {"tool_calls": {"type": "null"}}
TOOL_CALLS = {"tool_calls": {"type": "array", "minItems": 1}}


class Message(StrictModel):
    model_config = any_of(
        {"role": {"enum": ["system", "developer", "user"]}} | CONTENT | NO_TOOL_CALLS,
        {"role": {"const": "tool"}, "tool_call_id": {"type": "string"}} | CONTENT | NO_TOOL_CALLS,
        {"role": {"const": "assistant"}} | CONTENT,
        {"role": {"const": "assistant"}} | TOOL_CALLS,
    )
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=64)] | None = None
    name: Annotated[str, StringConstraints(max_length=128)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    # What else OpenAI's answers contain, and what its client adds: accepted, because people send answers back.
    refusal: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=64)] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = None

    @model_validator(mode="after")
    def check_fields_of_role(self):
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content, unless it is an assistant message with tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message may have tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs tool_call_id")
        return self

    def to_chat_format(self) -> dict:
        """The message as tokenizer/chat_format.py expects it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict = {"role": role, "content": content}
        if self.tool_calls:
            fields = {"id": True, "type": True, "function": {"name", "arguments"}}
            message["tool_calls"] = [call.model_dump(include=fields) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def check_schema_limits(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema. Raises ValueError if its size, its depth or a pattern exceeds the limits."""

    def check(value, depth: int) -> None:
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"a schema may have at most {MAX_SCHEMA_DEPTH} levels")
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "pattern" and isinstance(inner, str) and len(inner) > MAX_PATTERN:
                    raise ValueError(f"a pattern may have at most {MAX_PATTERN} characters")
                check(inner, depth + 1)
        elif isinstance(value, list):
            for inner in value:
                check(inner, depth + 1)

    check(schema, 0)
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise ValueError(f"a schema may have at most {MAX_SCHEMA} characters")
    return schema


class Function(StrictModel):
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def check_limits(cls, schema):
        return check_schema_limits(schema) if schema else schema


class ToolDefinition(StrictModel):
    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    name: FunctionName


class ToolChoice(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(StrictModel):
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def check_limits(cls, schema):
        return check_schema_limits(schema)


class ResponseFormat(StrictModel):
    model_config = any_of(
        {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}},
        {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}},
    )
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema_is_given(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is required with the type json_schema, and not allowed with any other")
        return self


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class CommonRequest(StrictModel):
    """The fields that chat and plain completions share."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_TEXTS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    # Accepted because they change nothing about the reply here: bookkeeping of OpenAI's servers, and hints.
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Hint | None = None
    safety_identifier: Hint | None = None
    prompt_cache_key: Hint | None = None
    prompt_cache_retention: Hint | None = None
    reasoning_effort: Hint | None = None
    verbosity: Hint | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    timings: bool = False

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(CommonRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    person: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    server_tools: Annotated[list[FunctionName], Field(max_length=8)] | None = None

    @model_validator(mode="after")
    def check_combinations(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs")
        names = {tool.function.name for tool in self.tools or ()}
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice requires tools")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names '{self.tool_choice.function.name}', which is not among the tools")
        has_format = self.response_format is not None and self.response_format.type != "text"
        may_call = bool(self.server_tools) or (bool(names) and self.tool_choice != "none")
        if has_format and may_call:
            raise ValueError("response_format cannot be combined with tools (unless tool_choice is none)")
        if self.person and (self.n or 1) > 1:
            raise ValueError("n must be 1 with person")
        return self


class CompletionRequest(CommonRequest):
    prompt: Text | Texts | TokenIds | TokenIdLists
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def check_combinations(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 requires echo")
        if len(self.prompts) * (self.n or 1) > MAX_PROMPTS:
            raise ValueError(f"the number of prompts times n may be at most {MAX_PROMPTS}")
        return self

    @property
    def prompts(self) -> list:
        """The prompts, each a text or a list of token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt


class TokenizeRequest(StrictModel):
    model: ModelName
    content: Text
