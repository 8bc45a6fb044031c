"""Files that people have: other encodings, compressed, in other forms, damaged, behind links. What can be read is read;
for everything else one line names the file, the line and a remedy that works."""

import bz2
import gzip
import json
import lzma
import random
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from nanoghost.data.conversations import load_conversations
from nanoghost.data.file_reader import read_texts
from nanoghost.data.registry import open_data_source
from nanoghost.data.rows import parquet_rows
from nanoghost.data.text_io import read_text
from nanoghost.errors import UserError
from nanoghost.home import read_json
from nanoghost.serve.server import ServeSettings, read_api_key
from nanoghost.train.distill import is_text

TEXT = "Grüße, 朝 \U0001f41d\u2028one line\u0085still the same\n" * 3
CHAT = [{"role": "user", "content": "Wer?\n\u2028"}, {"role": "assistant", "content": "Ich, 朝."}]


def text_of_source(path) -> str:
    return "".join(document.text for document in open_data_source(str(path)).documents())


# ── encodings and compression ────────────────────────────────────────────────────────────────────────────────────────

ENCODINGS = {
    "UTF-8": str.encode,
    "UTF-8 with a mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "no end of line": lambda text: text.rstrip("\n").encode(),
    "UTF-16LE with a mark": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16BE with a mark": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32 with a mark": lambda text: text.encode("utf-32"),
    "gzip": lambda text: gzip.compress(text[:20].encode()) + gzip.compress(text[20:].encode()),
    "bzip2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "zstd": lambda text: pa.Codec("zstd").compress(text.encode(), asbytes=True),
    "UTF-16 in gzip": lambda text: gzip.compress(text.encode("utf-16")),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_other_encodings_is_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(ENCODINGS[encoding](TEXT))
    assert text_of_source(tmp_path / "a.txt").rstrip("\n") == TEXT.rstrip("\n")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("as_list", [False, True])
def test_conversations_in_other_encodings_are_read(tmp_path, encoding, as_list):
    rows = [json.dumps({"messages": CHAT}, ensure_ascii=False), "", json.dumps({"messages": CHAT})]
    text = json.dumps([json.loads(row) for row in rows if row], indent=1) if as_list else "\n".join(rows) + "\n\n"
    (tmp_path / "a.jsonl").write_bytes(ENCODINGS[encoding](text))
    assert load_conversations(tmp_path / "a.jsonl") == [CHAT, CHAT]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.bz2", "A.TXT.XZ"])
def test_compressed_files_in_a_folder_and_at_a_url_are_read(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(gzip.compress(TEXT.encode()))  # the content decides, not the ending
    assert text_of_source(tmp_path / "data") == TEXT
    assert text_of_source(f"file://{tmp_path}/data") == TEXT


def test_compressed_json_at_a_url_is_read(tmp_path):
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(json.dumps({"text": TEXT}).encode()))
    assert text_of_source(f"file://{tmp_path}/c4-*.json.gz") == TEXT


def test_the_encoding_is_named_on_standard_error(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-16")
    text_of_source(tmp_path / "a.txt")
    assert capsys.readouterr().err == f"{tmp_path}/a.txt: read as UTF-16\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_api_key_is_read_from_a_file_of_any_editor(tmp_path, encoding):
    (tmp_path / "key").write_text("0123456789abcdef\r\n", encoding=encoding)
    assert read_api_key(ServeSettings(api_key_file=tmp_path / "key")) == "0123456789abcdef"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("naïve €\n".encode("cp1252"), "naïve €\n"),
        ("fine\nna\xefve\n".encode("latin1"), "fine\nnaïve\n"),
        ("one\ntwo\n".encode("utf-16-le"), "one\ntwo\n"),
        ("one\ntwo\n".encode("utf-16-be"), "one\ntwo\n"),
        ("私の犬はレックスです。\n".encode("cp932"), "私の犬はレックスです。\n"),
        ("私の犬はレックスです。\n".encode("euc-jp"), "私の犬はレックスです。\n"),
        ("hi\n我的狗叫雷克斯，住在上海。\n".encode("gb18030"), "hi\n我的狗叫雷克斯，住在上海。\n"),
        ("我的狗叫雷克斯，住在臺北。\n".encode("big5"), "我的狗叫雷克斯，住在臺北。\n"),
        ("내 개의 이름은 렉스입니다.\n".encode("euc-kr"), "내 개의 이름은 렉스입니다.\n"),
        ("Мою собаку зовут Рекс.\n".encode("cp1251"), "Мою собаку зовут Рекс.\n"),
        ("Мою собаку зовут Рекс.\n".encode("koi8-r"), "Мою собаку зовут Рекс.\n"),
        ("Ο σκύλος μου λέγεται Ρεξ.\n".encode("cp1253"), "Ο σκύλος μου λέγεται Ρεξ.\n"),
        ("Mój pies wabił się Reks.\n".encode("cp1250"), "Mój pies wabił się Reks.\n"),
        ("„Größe“ – 5 m² für 3 €\n".encode("cp1252"), "„Größe“ – 5 m² für 3 €\n"),
        ("é and a cut é".encode()[:-1], "é and a cut "),
        ("é".encode() + b" \xff!", "é !"),
    ],
)
def test_the_remedy_for_another_encoding_works(tmp_path, content, expected):
    """The arguments of `iconv` in the message, carried out by Python."""
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt, line \d+: byte \d+") as error:
        read_text(tmp_path / "a.txt")
    drop, encoding = re.search(r"iconv (-c )?-f (\S+) -t utf-8$", str(error.value)).groups()
    (tmp_path / "a.txt").write_text(content.decode(encoding, errors="ignore" if drop else "strict"), encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == expected


# ── damaged files ────────────────────────────────────────────────────────────────────────────────────────────────────

FINE = b'{"text": "fine"}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", FINE + b'{"text": "x", "meta": ' + DEEP + b"}\n", "a.jsonl:2: too many brackets inside one"),
        ("a.json", b"[\n" + FINE + b",\n" + b'{"text": ' + DEEP + b"}]", "a.json:4: too many brackets"),
        ("a.jsonl", FINE + b'{"text": "x", "n": ' + b"7" * 5000 + b"}", "a.jsonl:2: a number has too many digits"),
        ("a.jsonl", b'\n{"text": "a", "text": "b"}', "a.jsonl:2: an object has the key 'text' twice"),
        ("a.jsonl", b'{"text": "a", "meta": {"k": 1, "k": 1}}', "a.jsonl:1: an object has the key 'k' twice"),
        ("a.jsonl", b'{"text": "a", "meta": ["\\ud83d"]}', "a.jsonl:1: .* surrogate pair"),
        ("a.jsonl", b'{"text": NaN}', "a.jsonl:1: 'text' is None, not a string"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}', "a.jsonl:1: not JSON: Extra data at column 14"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', r"a.json:2: not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"},\n', "a.json:2: not JSON: the list has no end"),
        ("a.json", b'[{"text": "a"}]\n[]', "a.json:1: not JSON: text after the end of the list"),
        ("a.json", b'{\n "text": "a"\n}', "a.json:1: not JSON: .* one value a line, or is one list"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "a.jsonl, line 1: byte 1 is zero.* utf-16le"),
        ("a.txt", b"text\n\x7fELF\x02\x01\x01\0" + b"x" * 40, "a.txt, line 2: byte 12 is zero.* binary or damaged"),
        ("a.txt", b"text \xff\xd3\x01\x80\x81", "a.txt, line 1: byte 5 .*is binary or damaged, or in an encoding that"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a.txt is a PDF: extract its text"),
        ("a.txt", b"PK\x03\x04" + b"x" * 40, r"a.txt is a ZIP archive \(also .docx"),
        ("a.md", b"{\\rtf1 text}", "a.md is an RTF document"),
        ("a.jsonl", b"PAR1" + b"x" * 40, "a.jsonl is a parquet file: its name must end with .parquet"),
        ("a.txt", b"\xff\xfea\0b", "a.txt starts with the mark of UTF-16, but byte 4 is not UTF-16"),
        ("a.txt.gz", gzip.compress(TEXT.encode())[:-9], "a.txt.gz is damaged or cut"),
        ("a.txt.xz", lzma.compress(TEXT.encode())[:-9], "a.txt.xz is damaged or cut"),
        ("a.txt.bz2", bz2.compress(TEXT.encode())[:-9], "a.txt.bz2 is damaged or cut"),
        ("a.txt.zst", pa.Codec("zstd").compress(TEXT.encode(), asbytes=True)[:-2], "a.txt.zst is damaged or cut"),
        ("a.txt.gz", b"", "a.txt.gz: it contains no text"),
        ("a.jsonl", b"\n\r\n", "a.jsonl: it contains no text"),
        ("a.json", b" [ ]\n", "a.json: it contains no text"),
        ("a.parquet", b"", "a.parquet: not a parquet file"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "a.jsonl:1: pairs of a 'chosen' and a 'rej"),
        ("a.jsonl", b'{"story": "a"}', "a.jsonl:1: expected an object with 'text' .*, not with 'story'"),
    ],
    ids=range(30),
)  # fmt: skip
def test_damaged_files_end_in_one_line_and_leave_nothing(tmp_path, nanoghost, home, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, _, err = nanoghost("tokenizer", "train", "--data", tmp_path / name, "--vocab-size", 300)
    assert code == 2
    assert re.fullmatch(f"nanoghost: {tmp_path}/.*\n", err)
    assert re.search(message, err), err
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_unused_nan_and_infinity_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN, "range": [-Infinity, Infinity]}\n' * 2)
    assert text_of_source(tmp_path / "a.jsonl") == "xx"


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("checksum", [False, True])
def test_a_damaged_parquet_file_is_named_with_its_row(tmp_path, compression, checksum):
    """Flipped bits anywhere in the file: either the rows are read, or the error is a line that names the file."""
    texts = [f"Zeile {i}, wörtlich. " * 5 for i in range(3000)]
    options = {"compression": compression, "write_page_checksum": checksum, "data_page_size": 4096}
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **options)
    good = (tmp_path / "a.parquet").read_bytes()
    rng, messages = random.Random(0), []
    for _ in range(40):
        content = bytearray(good)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.parquet").write_bytes(content)
        try:
            rows = [row.value["text"] for row in parquet_rows(tmp_path / "a.parquet", ("text",))]
        except UserError as error:
            messages.append(str(error))
        else:
            assert len(rows) == 3000
            assert rows == texts or not checksum
    assert all(message.startswith(f"{tmp_path}/a.parquet") for message in messages)
    assert any(re.search(r"a.parquet, row \d+ or later: the file is damaged", m) for m in messages) or not checksum


def test_rows_before_a_damaged_page_are_counted(tmp_path):
    table = pa.table({"text": [f"text {i}" for i in range(5000)]})
    options = {"row_group_size": 2048, "compression": "none", "write_page_checksum": True, "use_dictionary": False}
    parquet.write_table(table, tmp_path / "a.parquet", **options)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"text 4200", b"text 42OO"))
    with pytest.raises(UserError, match="a.parquet, row 4097 or later: the file is damaged"):
        text_of_source(tmp_path / "a.parquet")


def test_a_damaged_file_of_our_own_with_many_brackets_is_named(tmp_path):
    (tmp_path / "card.json").write_bytes(DEEP)
    with pytest.raises(UserError, match="card.json is damaged"):
        read_json(tmp_path / "card.json")


# ── forms of conversations ───────────────────────────────────────────────────────────────────────────────────────────

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = {"role": "user", "content": "Six\nby seven?"}, {"role": "assistant", "content": "42"}
SHAREGPT = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "42"}]

FORMS = {
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "conversations": ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "ShareGPT": ({"id": "x", "conversations": SHAREGPT}, [USER, ASSISTANT]),
    "ShareGPT's names in messages": ({"messages": SHAREGPT}, [USER, ASSISTANT]),
    "ShareGPT with a system text": (
        {"system": "Be brief.", "conversations": SHAREGPT},
        [SYSTEM, USER, ASSISTANT],
    ),
    "ShareGPT with a system message": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]},
        [SYSTEM, USER, ASSISTANT],
    ),
    "Alpaca": ({"instruction": "Six", "input": "by seven?", "output": "42"}, [USER, ASSISTANT]),
    "Alpaca without input": ({"instruction": USER["content"], "input": "", "output": "42"}, [USER, ASSISTANT]),
    "Alpaca with a system text": (
        {"system": "Be brief.", "instruction": USER["content"], "output": "42"},
        [SYSTEM, USER, ASSISTANT],
    ),
    "prompt and completion": ({"prompt": USER["content"], "completion": "42"}, [USER, ASSISTANT]),
    "messages as prompt and completion": (
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        [SYSTEM, USER, ASSISTANT],
    ),
    "prompt": ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
    "messages beside pairs of answers": (
        {"prompt": "Six?", "chosen": [ASSISTANT], "rejected": [USER], "messages": [USER, ASSISTANT]},
        [USER, ASSISTANT],
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lines", "list", "parquet"])
def test_conversations_in_other_forms_are_read(tmp_path, capsys, form, kind):
    row, expected = FORMS[form]
    path = tmp_path / {"lines": "a.jsonl", "list": "a.json", "parquet": "a.parquet"}[kind]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist([row, row]), path)
    else:
        path.write_text(json.dumps([row, row], indent=2) if kind == "list" else f"{json.dumps(row)}\n" * 2)
    assert load_conversations(path) == [expected, expected]
    says_so = f"{path}: read as conversations of the form" in capsys.readouterr().err
    assert says_so == ("messages" not in row or kind != "lines")
    assert not is_text(str(path))
    text = "\n".join(message["content"] for message in expected)
    assert text_of_source(path) == 2 * text


def test_the_text_of_a_row_comes_before_its_messages(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "The text.", "messages": CHAT}) + "\n")
    [(_, text)] = read_texts("a.jsonl", tmp_path / "a.jsonl")
    assert text == "The text."


def test_an_item_of_a_list_in_one_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CHAT}, {"messages": CHAT}, {"messages": []}]))
    with pytest.raises(UserError, match="a.json:1, item 3: "):
        load_conversations(tmp_path / "a.json")


def test_text_rows_are_text_for_distillation(tmp_path):
    for name in ("a.jsonl", "a.json", "a.parquet", "a.txt", "none.jsonl"):
        path = tmp_path / name
        if name == "a.parquet":
            parquet.write_table(pa.table({"text": ["one"]}), path)
        elif name != "none.jsonl":
            path.write_text('{"text": "one"}\n')
        assert is_text(str(path)), name


@pytest.mark.parametrize("several", [False, True])
def test_tool_calls_in_sharegpt_form_become_openai_calls(tmp_path, several):
    call = {"name": "add", "arguments": {"a": 1, "b": float("nan")}}
    conversation = [
        {"from": "human", "value": "1?"},
        {"from": "function_call", "value": json.dumps([call, call] if several else call)},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "One."},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": conversation, "tools": "[]"}]))
    [messages] = load_conversations(tmp_path / "a.json")
    expected = {"function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [expected] * (2 if several else 1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "expected an object with 'messages' .*'conversations', or 'prompt' .*, not with 'text'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs of .*, rename 'chosen' to 'completion'"),
        ({"chosen": CHAT, "rejected": CHAT}, "pairs of .*, or to 'messages' if it is a whole conversation"),
        ([1], "expected an object with 'messages' \\(or .*'output'.*\\)$"),
        ({"conversations": "x"}, "'conversations' must be a list"),
        ({"conversations": []}, "'conversations' must be a list with at least one message"),
        ({"conversations": [{"from": "human"}]}, "message 1: 'content' must be a string"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1: role 'narrator' must be one of"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "message 1: role None must be one of"),
        ({"conversations": [*SHAREGPT, {"from": "function_call", "value": "add(1)"}]}, "message 3: a call must be"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "message 1 has 'weight' 0"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' is false"),
        ({"conversations": [{"from": "function_call", "value": '"x"'}]}, "message 1: 'tool_calls' must be a list of"),
        ({"conversations": [{"from": "function_call", "value": r'{"name": "\ud83d"}'}]}, "message 1: .*surrogate"),
        ({"instruction": 7, "output": "x"}, "'instruction' is 7, not a string"),
        ({"instruction": "x", "input": ["y"], "output": "x"}, r"'input' is \['y'\], not a string"),
        ({"system": {}, "instruction": "x", "output": 1.5}, "'output' is 1.5, not a string"),
        ({"prompt": "x", "completion": 7}, "'completion' must be a list"),
    ],
)  # fmt: skip
def test_errors_in_other_forms_name_file_and_line(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"a.jsonl:3: {message}"):
        load_conversations(tmp_path / "a.jsonl")


def test_a_call_in_the_older_form_of_openai_is_a_tool_call(tmp_path):
    call = {"name": "add", "arguments": '{"a": 1}'}
    row = {"messages": [{"role": "assistant", "content": "", "function_call": call}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [[message]] = load_conversations(tmp_path / "a.jsonl")
    assert message["tool_calls"] == [{"function": call}]
