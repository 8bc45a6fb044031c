"""Single modules: Markdown, and the tree of a conversation."""

import re
import unicodedata

PIECES = """
const { Markdown } = await import('/static/markdown.js');
let state = args[0];
const random = (n) => {
  state = (state * 1664525 + 1013904223) % 4294967296;
  return Math.floor(state / 4294967296 * n);
};
const pick = (all) => all[random(all.length)];
let words = 0;
const word = () => `w${words++}w`;
const marks = ['*', '**', '_', '__', '~~', '`', '``', '[', ']', '](', '(', ')', '](https://a.b/c)',
  '!', '$', '\\\\', '<b>', '&amp;', '|', '\\n', '  \\n', ' ', '\\n\\n', ' ', ': '];
const starts = ['# ', '### ', '- ', '  - ', '    - ', '1. ', '   2) ', '> ', '>> ', '```js\\n',
  '```\\n', '~~~\\n', '---\\n', '| ', '|---|---|\\n', '$$', '\\\\[', '\\t', '\\r\\n', '***\\n', '-', '=', ''];
const line = () => pick(starts) + Array.from({length: 1 + random(8)}, () => word() + pick(marks)).join('')
  + pick(['\\n', '\\n\\n', ' ']);
const write = () => Array.from({length: 1 + random(12)}, line).join('');
const draw = (text, sizes) => {
  const box = document.createElement('div');
  const markdown = new Markdown(box, new Set([1]));
  for (let at = 0; sizes && at < text.length; ) { at += 1 + random(sizes); markdown.update(text.slice(0, at)); }
  markdown.update(text, true);
  return box;
};
"""


def test_incremental_markdown_equals_markdown_at_once(empty):
    wrong = empty.run_async(
        PIECES
        + """
        for (let n = 0; n < 400; n++) {
          const text = write();
          const whole = draw(text, 0).outerHTML;
          for (const sizes of [1, 7]) {
            const pieces = draw(text, sizes).outerHTML;
            if (pieces !== whole) return [text, pieces, whole];
          }
        }
        return null;""",
        7,
    )
    assert wrong is None, "\n".join(wrong)


def test_markdown_keeps_all_words_in_order(empty):
    wrong = empty.run_async(
        PIECES
        + """
        for (let n = 0; n < 1500; n++) {
          const text = write();
          const shown = draw(text, 0);
          // A word behind ``` names the language and stands in the head of the code, where it may be cut.
          const found = (shown.textContent.match(/w\\d+w/g) ?? []).join(' ');
          const asked = (text.replace(/^ *(```|~~~)[^`\\n]*$/gm, '').match(/w\\d+w/g) ?? []).join(' ');
          if (found !== asked && !/```|~~~/.test(text)) return [text, found, asked];
        }
        return null;""",
        11,
    )
    assert wrong is None, "\n".join(wrong)


CASES = [
    (
        "a *b* **c** ***d*** ~~e~~ `f*` _g_ h_i_j",
        "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f*</code> <em>g</em>"
        " h_i_j</p>",
    ),
    ("**a *b* c** 2 * 3 * 4 \\*x\\*", "<p><strong>a <em>b</em> c</strong> 2 * 3 * 4 *x*</p>"),
    ("# A `b` #\ntext\n***", "<h3>A <code>b</code></h3><p>text</p><hr>"),
    (
        "- a\n  - b\n    1. c\n- d\n\n  more",
        "<ul><li>a<ul><li>b<ol><li>c</li></ol></li></ul></li><li>d<p>more</p></li></ul>",
    ),
    ("3. a\n4. b\ntext", '<ol start="3"><li>a</li><li>b<br>text</li></ol>'),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("one\ntwo<br>three", "<p>one<br>two<br>three</p>"),
    ("in the year\n1984. it was", "<p>in the year<br>1984. it was</p>"),
    (
        "it costs $5 and $6, $x^2$ and \\(y\\)",
        '<p>it costs $5 and $6, <code class="formula">x^2</code> and <code class="formula">y</code></p>',
    ),
    ("<b>not bold</b> &lt;", "<p>&lt;b&gt;not bold&lt;/b&gt; &amp;lt;</p>"),
    (
        "so [1] and [2] [x](y)",
        '<p>so<button type="button" class="cite" data-passage="1" aria-label="Passage 1">1</button> and [2] [x](y)</p>',
    ),
    (
        "see https://a.b/c_d_(e). *https://a.b*",
        '<p>see <L="https://a.b/c_d_(e)">https://a.b/c_d_(e)</a>. <em><L="https://a.b/">https://a.b</a></em></p>',
    ),
    (
        "[*t*](https://a.b/) ![p](https://a.b/) [m](mailto:x@y.z)",
        '<p><L="https://a.b/"><em>t</em></a> <L="https://a.b/">Image: p</a> <L="mailto:x@y.z">m</a></p>',
    ),
]


def test_markdown(empty):
    markup = empty.run_async(
        """
        const { Markdown } = await import('/static/markdown.js');
        return args[0].map((source) => {
          const box = document.createElement('div');
          new Markdown(box, new Set([1])).update(source, true);
          return box.innerHTML;
        });""",
        [source for source, _ in CASES],
    )
    short = [
        re.sub(r'<a href="([^"]*)" title="\1" target="_blank" rel="noopener noreferrer">', r'<L="\1">', html)
        for html in markup
    ]
    assert short == [expected for _, expected in CASES]


def test_unclosed_marks_are_not_shown_while_text_arrives(empty):
    shown = empty.run_async("""
        const { Markdown } = await import('/static/markdown.js');
        const seen = [];
        const text = 'It is **very bold** and `code` [link](https://a.b/c)';
        for (let n = 1; n <= text.length; n++) {
          const box = document.createElement('div');
          new Markdown(box).update(text.slice(0, n));
          seen.push(box.textContent);
        }
        return seen;""")
    assert not [words for words in shown if re.search(r"[*`(]|\]", words)], shown


def test_trees(empty):
    results = empty.run_async("""
        const tree = await import('/static/tree.js');
        const user = (id, parent) => ({id, parent, role: 'user', text: id});
        const answer = (id, parent) => ({id, parent, role: 'assistant', model: 'm', parts: [{text: id}]});
        const ids = (one) => tree.path(one).map((node) => node.id).join('');
        const frozen = (one) => Object.freeze({nodes: Object.freeze(one.nodes), chosen: Object.freeze(one.chosen)});
        let one = frozen(tree.emptyTree());
        const nodes = [
          user('a', tree.ROOT), answer('b', 'a'), user('c', 'b'), answer('d', 'c'), answer('e', 'c'), user('f', 'b'),
        ];
        for (const node of nodes) one = frozen(tree.add(one, node));
        const back = frozen(tree.showSibling(one, 'f', -1));
        const call = {id: 'n', name: 'calculator', arguments: '{}', content: '2'};
        const stopped = {...call, content: undefined};
        const called = {role: 'assistant', parts: [{text: 'so'}, {call}, {text: 'two'}, {call: stopped}]};
        return {
          shown: ids(one), siblings: tree.siblings(one, 'c'), back: ids(back),
          further: ids(tree.showSibling(back, 'e', -1)),
          ends: [ids(tree.showSibling(one, 'f', 5)), ids(tree.showSibling(one, 'f', -9))],
          line: tree.ancestry(one, 'd').map((node) => node.id).join(''),
          without: ids(tree.without(back, 'e')), onlyChild: ids(tree.without(tree.without(back, 'e'), 'd')),
          roles: tree.messages([called], 'S', true).map((m) => m.role), plain: tree.messages([called], '', false),
          title: tree.titleFrom('  A title\\nmore'), long: [...tree.titleFrom('word '.repeat(40))].length,
        };""")
    assert results == {
        "shown": "abf",
        "siblings": ["c", "f"],
        "back": "abce",
        "further": "abcd",
        "ends": ["abf", "abce"],
        "line": "abcd",
        "without": "abcd",
        "onlyChild": "abc",
        "roles": ["system", "assistant", "tool", "assistant"],
        "plain": [{"role": "assistant", "content": "so\n\ntwo"}],
        "title": "A title",
        "long": 45,
    }


def test_conversations_are_found_in_every_unicode_form(empty):
    excerpts = empty.run_async("""
        const tree = await import('/static/tree.js');
        const texts = ['Das Cafe\\u0301 in Zürich', 'ﾚｯｸｽと犬', 'ＴＯＫＹＯ'];
        const queries = ['café', 'レックス', 'Tokyo'];
        return texts.map((text, i) => tree.find(
          {title: '', tree: tree.add(tree.emptyTree(), {id: 'a', parent: tree.ROOT, role: 'user', text})}, queries[i]));
    """)
    assert (
        [unicodedata.normalize("NFKC", text) for text in excerpts]
        == excerpts
        == ["Das Café in Zürich", "レックスと犬", "TOKYO"]
    )
