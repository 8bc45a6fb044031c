"""Chat templates with the traits of well-known ones, a tokenizer for them, and conversations of all kinds."""

import json

import tokenizers

from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

HERMES_CALL = '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# A default system message, text joined with +, calls as JSON between tags, results in a user message.
QWEN25 = (
    "{% if tools %}<|im_start|>system\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}"
    "{% endif %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<tool_call>...</tool_call><|im_end|>\n"
    "{% elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'system' or not loop.first %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls %}{% set f = call.function %}"
    + HERMES_CALL
    + "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    + PROMPT
)
# Text or nothing as content, arguments in both forms. Reasoning stands only in the last answer, empty if there is none.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}{% set text = m.content if m.content is string else '' %}"
    "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ text }}\n</tool_response>"
    "{% elif m.role == 'assistant' %}{% set reasoning = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set reasoning = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}{{ text }}"
    "{% for call in m.tool_calls %}{% set f = call.function %}\n"
    '<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}}\n</tool_call>{% endfor %}"
    "{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)
# A date, and calls in another form than ours: {"name", "parameters"} without tags.
LLAMA3 = (
    "{{ bos_token }}<|im_start|>system\nToday is {{ strftime_now('%Y') }}.\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}"
    "{% for t in tools or [] %}{{ t | tojson(indent=4) }}{% endfor %}<|im_end|>\n"
    "{% for m in messages %}{% if m.tool_calls is defined %}{% set f = m.tool_calls[0].function %}"
    '<|im_start|>assistant\n{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|im_end|>\n'
    "{% elif m.role == 'tool' %}<|im_start|>ipython\n{{ m.content | tojson }}<|im_end|>\n"
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endif %}"
    "{% endfor %}" + PROMPT
)
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
# No system role, no tools, and the roles must alternate; the assistant is called model.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + ALTERNATE
    + "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# No header before an answer; a first system message is part of the question; calls need ids of nine characters.
MISTRAL = (
    "{{ bos_token }}{% set first = messages[0].role == 'system' %}{% set rest = messages[1:] if first else messages %}"
    "{% for m in rest %}{% if m.role in ['user', 'assistant'] and not m.tool_calls %}"
    "{% if m.role == 'user' %}[INST] {{ messages[0].content + '\n\n' if first and loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}" + ALTERNATE + "{% elif m.tool_calls %}"
    "{% if m.tool_calls[0].id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    "[TOOL_CALLS]{{ m.tool_calls[0].function | tojson }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# The generation prompt opens the reasoning; in answers it is dropped.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# The reasoning is opened, too, and answers are written as they are.
OPEN_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Content must be a list of parts.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)
TEMPLATES = {
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "deepseek-r1": DEEPSEEK_R1,
    "open think": OPEN_THINK,
    "parts": PARTS,
}
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MORE_TOKENS = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "[INST]", "[/INST]", "[TOOL_CALLS]")


def tokenizer_with(source: str, tool_use_source: str = "") -> Tokenizer:
    """A toy tokenizer with this template. As in Qwen and DeepSeek, many of its added tokens are not special."""
    definition = json.loads(Tokenizer.train([toy_text(100)], 300).to_json())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in PLAIN_TOKENS
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in MORE_TOKENS])
    tokenizer = Tokenizer(backend)
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer.chat_template = ChatTemplate(source, names, {tokenizer.special_id("<|im_end|>")}, tool_use_source)
    return tokenizer


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────


def say(role: str, content) -> dict:
    return {"role": role, "content": content}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def caller(arguments: str, name: str = "weather", content: str | None = "") -> dict:
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
    return say("assistant", content) | {"tool_calls": [call]}


def result(content: str) -> dict:
    return say("tool", content) | {"tool_call_id": "call00001"}


WEATHER = {
    "name": "weather",
    "description": "The weather of a town, today.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "description": "Name: Zürich, 東京 ..."}},
        "required": ["town"],
    },
}
Q, A = say("user", "Rain?"), say("assistant", "No.")
TOWN = '{"town": "Zürich"}'

PLAIN = [  # orders that every template takes
    [Q],
    [Q, A],
    [Q, A, say("user", "And then?")],
    [Q, A, say("user", "And then?"), say("assistant", "Sun.")],
    [say("user", parts("Ra", "in?"))],
    [say("user", parts("Rain?")), say("assistant", parts("N", "o", ".")), Q],
    [say("user", "naïve  東京 👻\n\n x 123"), say("assistant", "def f(x):\n    return x"), Q],
    [say("user", "{{ 1 }} {% if %} <b>&amp;"), A],
    [say("user", 'a "quoted" \\n text'), A, say("user", "x" * 50)],
    [Q | {"name": "ann"}, A, Q],
    [say("user", "1\n2\n"), say("assistant", "\tTabs."), Q],
    [say("user", parts("Is it", " 12 + 30?")), say("assistant", parts("4", "2")), say("user", parts("Sure?"))],
    [say("user", "e\u0301 \u00e9 ½ ﬁ"), A],
]
SYSTEM = [
    [say("system", "Be brief."), Q],
    [say("system", "Be brief."), Q, A, Q],
    [say("system", parts("Be", " brief.")), Q, A],
    [say("system", "Be brief.\nAnd kind."), Q, A, say("user", "Why?"), A],
    [say("system", ""), Q],
]
THINKING = [
    [Q, say("assistant", "<think>\nhm\n</think>\n\nNo.")],
    [Q, say("assistant", "<think>\nhm\n</think>\n\nNo."), Q, A],
    [Q, A | {"reasoning_content": "hm"}],
    [Q, A | {"reasoning": "hm"}, Q, A | {"thinking": "well"}],
    [Q, A | {"reasoning_content": "hm\n\nso"}, Q],
    [Q, say("assistant", "<think>\n\n</think>\n\nNo."), Q],
]
ODD_ORDERS = [
    [say("system", "Be brief."), say("system", "And kind."), Q],
    [Q, A, say("system", "Now in French."), Q],
    [Q, say("system", "Be brief.")],
    [Q, Q, A],
    [Q, A, Q, Q],
    [A, Q, A],
    [A, Q],
    [Q, A, A],
]
TOOLS = [
    [Q, caller(TOWN), result("Sun")],
    [Q, caller(TOWN, content=None), result("Sun"), A],
    [Q, caller("", name="now"), result("noon"), A, Q],
    [Q, caller('{"a": {"b": [1, 2.5, null, true]}}'), result('{"x": "é"}'), A],
    [say("system", "Be brief."), Q, caller(TOWN, content="Let me see."), result("Sun\n")],
    [Q, A, Q, caller(TOWN), result("Sun"), A, Q],
    [Q, caller("{}"), result(""), A],
    [Q, caller(TOWN), result("Sun"), caller(TOWN, name="rain"), result("none"), A],
]
CONVERSATIONS = [*PLAIN, *SYSTEM, *THINKING, *ODD_ORDERS, *TOOLS]


def for_transformers(messages: list[dict]) -> list[dict]:
    """The messages as its users hand them over: text as content, arguments as objects."""
    converted = []
    for message in messages:
        message = message | {"content": message["content"] or ""}
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
        calls = message.get("tool_calls", ())
        functions = [c["function"] | {"arguments": json.loads(c["function"]["arguments"] or "{}")} for c in calls]
        if calls:
            message["tool_calls"] = [call | {"function": f} for call, f in zip(calls, functions)]
        converted.append(message)
    return converted


def with_calls_as_text(messages: list[dict]) -> list[dict]:
    """Messages of `for_transformers` for a template that knows no tools."""
    converted = []
    for message in messages:
        text = message["content"]
        for call in message.get("tool_calls", ()):
            text += f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        if message["role"] == "tool":
            converted.append(say("user", f"<tool_response>\n{text}\n</tool_response>"))
        else:
            others = {key: value for key, value in message.items() if key != "tool_calls"}
            converted.append(others | {"content": text})
    return converted
