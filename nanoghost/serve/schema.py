"""What a request may say. OpenAI's fields with limits; a field that is not here is refused, so that nobody believes it works."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_MESSAGES = 512
MOST_TEXT = 400_000  # characters of one text
MOST_SAMPLES = 8
MOST_PROMPTS = 64
MOST_STOPS = 8
MOST_TOOLS = 32
MOST_TOP = 20
MOST_SCHEMA = 32_768  # characters of a JSON schema
DEEPEST_SCHEMA = 24  # brackets in brackets
LONGEST_PATTERN = 256  # characters of a regular expression in a schema

Text = Annotated[str, StringConstraints(max_length=MOST_TEXT)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=129)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=131_072)]
Zero = Annotated[float, Field(ge=0, le=0)]  # what OpenAI has and no model here does: only its default is taken


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Part):
    type: Literal["text"]
    text: Text


class CalledFunction(Part):
    name: FunctionName
    arguments: Text


class ToolCall(Part):
    id: Annotated[str, StringConstraints(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


def one_of(*kinds: dict) -> ConfigDict:
    """For the description of the API: which fields go together."""

    def needed(kind: dict) -> list[str]:
        return [name for name, schema in kind.items() if schema.get("type") != "null"]

    return ConfigDict(json_schema_extra={"anyOf": [{"properties": kind, "required": needed(kind)} for kind in kinds]})


SAID = {"content": {"type": ["string", "array"]}}
CALLED = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}


class Message(Part):
    model_config = one_of(
        {"role": {"enum": ["system", "developer", "user"]}} | SAID | {"tool_calls": {"type": "null"}},
        {"role": {"const": "tool"}, "tool_call_id": {"type": "string"}} | SAID | {"tool_calls": {"type": "null"}},
        {"role": {"const": "assistant"}} | SAID, CALLED,
    )  # fmt: skip
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=64)] | None = None
    name: Annotated[str, StringConstraints(max_length=128)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    refusal: None = None

    @model_validator(mode="after")
    def says_something(self):
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content (only an assistant's with tool_calls may do without)")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message may have tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool's message needs tool_call_id")
        return self

    def plain(self) -> dict:
        """In the words of chat.py."""
        role = "system" if self.role == "developer" else self.role
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        message: dict = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def within_limits(schema: dict[str, Any]) -> dict[str, Any]:
    """Size, depth and patterns of a JSON schema. Raises ValueError."""

    def look(value, depth: int) -> None:
        if depth > DEEPEST_SCHEMA:
            raise ValueError(f"a schema may be {DEEPEST_SCHEMA} levels deep")
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "pattern" and isinstance(inner, str) and len(inner) > LONGEST_PATTERN:
                    raise ValueError(f"a pattern may have {LONGEST_PATTERN} characters")
                look(inner, depth + 1)
        elif isinstance(value, list):
            for inner in value:
                look(inner, depth + 1)

    look(schema, 0)
    if len(json.dumps(schema)) > MOST_SCHEMA:
        raise ValueError(f"a schema may have {MOST_SCHEMA} characters")
    return schema


class Function(Part):
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def small(cls, schema):
        return schema and within_limits(schema)


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: FunctionName


class ToolChoice(Part):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Part):
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def small(cls, schema):
        return within_limits(schema)


class ResponseFormat(Part):
    model_config = one_of(
        {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}},
        {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}},
    )
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_its_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and must be given there")
        return self


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Part):
    """What both kinds of completion take."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    timings: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    person: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    server_tools: Annotated[list[FunctionName], Field(max_length=8)] | None = None

    @model_validator(mode="after")
    def fits_together(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        names = {tool.function.name for tool in self.tools or ()}
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names '{self.tool_choice.function.name}', which is not among the tools")
        shaped = self.response_format and self.response_format.type != "text"
        if shaped and (self.server_tools or (names and self.tool_choice != "none")):
            raise ValueError("response_format goes without tools: ask for one or the other (or tool_choice none)")
        if self.person and (self.n or 1) > 1:
            raise ValueError("a person is answered once: n must be 1")
        return self


class CompletionRequest(Request):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)
    ]  # fmt: skip
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def writes_something(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo")
        if len(self.prompts) * (self.n or 1) > MOST_PROMPTS:
            raise ValueError(f"prompts times n may be at most {MOST_PROMPTS}")
        return self

    @property
    def prompts(self) -> list:
        """Each a text or a list of ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt


class TokenizeRequest(Part):
    model: Name
    content: Text
