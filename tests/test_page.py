"""The chat page in a real browser, against a test server with prepared replies.

`make page` installs what it needs; without Chromium or selenium, all tests are skipped.
"""

import json
import re
import time
from pathlib import Path

import pytest

from tests.support import page_browser
from tests.support.page_hostile import HOSTILE
from tests.support.page_server import PAGE, Server, events, text
from tests.support.serving import crowded

pytest.importorskip("selenium", reason="selenium is not installed: make page")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

missing = not page_browser.CHROMIUM or not page_browser.DRIVER
pytestmark = pytest.mark.skipif(missing, reason="Chromium and its driver are not installed")

WATCH = """
window.violations = [];
const record = (e) => window.violations.push(e.violatedDirective + ' ' + e.blockedURI);
document.addEventListener('securitypolicyviolation', record);
window.problems = [];
addEventListener('error', (e) => window.problems.push(String(e.message)));
addEventListener('unhandledrejection', (e) => window.problems.push(String(e.reason)));
"""


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = page_browser.start(tmp_path_factory.mktemp("browser"))
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    yield browser
    browser.quit()


class Page:
    """Actions of a user on the page."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server

    def open(self, path="/", ready="return document.querySelectorAll('#model option').length"):
        if self.browser.current_url.startswith(f"{self.server.address}/#"):
            self.browser.get("about:blank")  # changing only the fragment would not load the page
        self.browser.get(self.server.address + path)
        self.wait(ready)

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def later(self, script, *arguments):
        """Runs the body of an async function; returns its value."""
        done = self.browser.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{ {script} }})(...arguments)"
            ".then((value) => done({value}), (e) => done({error: String(e.stack)}))",
            *arguments,
        )
        assert "error" not in done, done["error"]
        return done["value"]

    def wait(self, condition, *arguments, seconds=30):
        until = time.time() + seconds
        while not (value := self.js(condition, *arguments)):
            assert time.time() < until, f"never: {condition}"
            time.sleep(0.02)
        return value

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector):
        self.one(selector).click()

    def send(self, words, wait=True):
        before = self.js("return document.querySelectorAll('.message').length")
        self.one("#message").send_keys(words, Keys.ENTER)
        self.wait("return document.querySelectorAll('.message').length > arguments[0]", before)
        if wait:
            self.idle()

    def idle(self, seconds=30):
        self.wait(
            "return document.querySelector('.message') && !document.querySelector('.writing')"
            " && document.getElementById('send').ariaLabel === 'Send'",
            seconds=seconds,
        )

    def texts(self):
        return self.js("return [...document.querySelectorAll('.message .content')].map((e) => e.textContent)")

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def titles(self):
        return self.js("return [...document.querySelectorAll('#conversations .title')].map((e) => e.textContent)")

    def stored(self):
        return self.later("const store = await import('/static/store.js'); return store.loadAll();")

    def healthy(self):
        assert self.js("return window.problems") == []
        assert self.js("return window.violations") == []


@pytest.fixture
def empty(browser, server):
    """An empty page of the same origin, for tests of single modules."""
    page = Page(browser, server)
    page.open("/empty", "return true")
    return page


@pytest.fixture
def page(browser, server):
    server.reset()
    page_browser.theme(browser, "light")
    page_browser.resize(browser, 1280, 900)
    page = Page(browser, server)
    page.open("/empty", "return true")
    page.js("localStorage.clear(); sessionStorage.clear()")
    page.later(
        "await new Promise((done) => { const request = indexedDB.deleteDatabase('nanoghost');"
        " request.onsuccess = request.onerror = done; });"
    )
    page.open()
    yield page
    page.healthy()


# ── chat ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reply_survives_a_reload(page):
    page.send("Hello there, ghost")
    assert page.texts() == ["Hello there, ghost", "You said: Hello there, ghost"]
    assert "187 tokens/s" in page.one(".figures").text
    assert "context 412 of 2,048" in page.one(".figures").text
    body = page.server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Hello there, ghost"}]
    assert body["stream"]
    assert body["timings"]
    fields = {"model", "messages", "stream", "timings", "stream_options", "temperature", "top_p", "max_tokens"}
    assert set(body) == fields, "the server rejects unknown fields"
    assert page.titles() == ["Hello there, ghost"]
    page.send("And now?")
    assert [m["role"] for m in page.server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.message').length === 4")
    assert page.texts()[3] == "You said: And now?"
    assert page.js("return document.title").startswith("Hello there")


def test_stopping_keeps_the_text_and_cancels_the_request(page):
    page.send("forever", wait=False)
    page.wait("return document.querySelector('.assistant .content').textContent.includes('Word 5')")
    page.press(Keys.ESCAPE)
    page.idle()
    text_so_far = page.texts()[1]
    assert text_so_far.startswith("I begin. Word 1.")
    assert "stopped" in page.one(".figures").text
    until = time.time() + 20
    while not page.server.stopped:
        assert time.time() < until, "the request was not cancelled"
        time.sleep(0.02)
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.message').length === 2")
    assert page.texts()[1] == text_so_far
    page.send("go on")
    assert page.server.bodies[-1]["messages"][1]["content"].strip() == text_so_far.strip()


def test_reloading_during_a_reply_keeps_its_text(page):
    page.send("forever", wait=False)
    page.wait("return document.querySelector('.assistant .content').textContent.includes('Word 20')")
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.message').length === 2")
    assert "Word 8" in page.texts()[1]
    assert page.js("return !document.querySelector('.writing')")


def test_another_conversation_can_be_shown_during_a_reply(page):
    page.send("a quiet one")
    page.click("#new-chat")
    page.send("forever", wait=False)
    page.wait("return document.querySelectorAll('#conversations a').length === 2")
    page.js("document.querySelectorAll('#conversations a')[1].click()")
    page.wait(
        "return document.querySelector('.content').textContent === 'a quiet one' && !document.querySelector('.writing')"
    )
    assert page.texts()[1] == "You said: a quiet one"
    time.sleep(0.3)
    page.browser.back()
    page.wait("return document.querySelector('.writing')?.textContent.includes('Word 6')")
    page.click("#send")
    page.idle()


def test_regenerating_and_editing_create_branches(page):
    page.send("first")
    page.send("second")
    page.click(".message:last-child [aria-label='Regenerate reply']")
    page.wait("return document.querySelector('.message:last-child .count')?.textContent === '2 / 2'")
    page.idle()
    assert page.texts()[2:] == ["second", "You said: second"]
    page.js("document.querySelectorAll('.user')[0].querySelector('[aria-label^=Edit]').click()")
    page.press(Keys.CONTROL, "a")
    page.press("another", Keys.ENTER)
    page.wait("return document.querySelector('.user .count')?.textContent === '2 / 2'")
    page.idle()
    assert page.texts() == ["another", "You said: another"]
    assert page.server.bodies[-1]["messages"] == [{"role": "user", "content": "another"}]
    page.click(".user [aria-label='Previous version']")
    page.wait("return document.querySelectorAll('.message').length === 4")
    assert page.texts()[0] == "first"
    assert page.one(".message:last-child .count").text == "2 / 2"
    page.click(".message:last-child [aria-label='Previous version']")
    page.wait("return document.querySelector('.message:last-child .count').textContent === '1 / 2'")
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.message').length === 4")
    assert [e.text for e in page.browser.find_elements(By.CSS_SELECTOR, ".count")] == ["1 / 2", "1 / 2"]
    page.send("third")
    assert [m["content"] for m in page.server.bodies[-1]["messages"]][::2] == ["first", "second", "third"]


def test_each_conversation_has_its_own_settings(page):
    page.click("#settings")
    page.one("#system").send_keys("Be brief.")
    page.js("""
        for (const [id, value] of [['temperature', 0.2], ['top_p', 0.5], ['max_tokens', 99], ['person', 'maya']]) {
          const field = document.getElementById(id);
          field.value = value;
          field.dispatchEvent(new Event('input', {bubbles: true}));
        }""")
    page.click("[name=tools][value=lookup]")
    page.press(Keys.ESCAPE)
    page.js("const m = document.getElementById('model'); m.value = 'smollm2@me'; m.dispatchEvent(new Event('change'))")
    page.send("who am I")
    body = page.server.bodies[0]
    assert body["model"] == "smollm2@me"
    assert body["person"] == "maya"
    assert body["server_tools"] == ["lookup"]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.2, 0.5, 99)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "as maya" in page.one("#settings-summary").text
    page.click("#new-chat")
    page.js("const m = document.getElementById('model'); m.value = 'ghost'; m.dispatchEvent(new Event('change'))")
    assert page.js("return document.getElementById('tools').disabled"), "this model was not trained to use tools"
    page.send("hello")
    body = page.server.bodies[1]
    assert body["model"] == "ghost"
    assert "server_tools" not in body
    assert body["messages"][0]["role"] == "user"
    page.js("document.querySelectorAll('#conversations a')[1].click()")
    page.wait("return document.getElementById('model').value === 'smollm2@me'")
    assert page.js("return document.getElementById('system').value") == "Be brief."


def test_tool_calls_and_passages_expand(page):
    page.send("tool")
    line = page.one(".call summary")
    assert line.text == "Calculated 17 * 23 → 391"
    assert not page.one(".call pre").is_displayed()
    line.click()
    assert "expression: 17 * 23" in page.one(".call").text
    page.send("next")
    roles = page.server.bodies[-1]["messages"]
    assert [m["role"] for m in roles] == ["user", "assistant", "tool", "assistant", "user"]
    assert roles[1]["tool_calls"][0]["id"] == roles[2]["tool_call_id"]
    assert roles[2]["content"] == "391"
    page.send("lookup")
    assert [e.text for e in page.browser.find_elements(By.CSS_SELECTOR, ".passages summary")] == [
        "1notes/garden.mdThe pear tree was planted in 1974.",
        "2notes/house.mdThe roof is from 1911.",
    ]
    cites = page.browser.find_elements(By.CSS_SELECTOR, ".cite")
    assert [e.text for e in cites] == ["1", "2"]
    assert "[7]" in page.texts()[-1]
    cites[0].click()
    assert "1974" in page.one(".passages details[open] blockquote").text
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.passages details').length === 2")


@pytest.mark.parametrize(
    ("message", "error", "partial_text"),
    [
        ("restart", "engine is restarting", ""),
        ("busy", "at capacity. Try again in 2 s", ""),
        ("wrong", "Temperature must be at most 2.", ""),
        ("crash", "It broke.", ""),
        ("died", "engine is restarting", "Half an ans"),
        ("broken", "Something is wrong.", "Half an ans"),
        ("cut", "ended early", "Until here"),
    ],
)
def test_errors_are_shown_and_can_be_retried(page, message, error, partial_text):
    page.send(message)
    assert error in page.one(".foot .problem").text
    assert page.texts()[1] == partial_text
    page.server.healed = True
    page.server.answers.clear()
    page.click(".retry")
    page.idle()
    page.wait("return !document.querySelector('.foot .problem')")
    assert page.texts()[1] == f"You said: {message}"
    assert bool(partial_text) == page.js("return Boolean(document.querySelector('.branches'))")


def test_an_unreachable_server_is_reported(page):
    page.send("hello")
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    page.send("anyone?")
    assert "does not respond" in page.one(".foot .problem").text
    page.browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    page.click(".retry")
    page.idle()
    assert page.texts()[-1] == "You said: anyone?"


def test_the_api_key_is_prompted_for_and_stored_for_the_session(page):
    page.server.key = "open sesame"
    page.open("/", "return document.getElementById('key-sheet').open")
    page.press("wrong", Keys.ENTER)
    page.wait("return document.getElementById('key-error').textContent.includes('rejected')")
    assert page.js("return document.querySelectorAll('dialog[open]').length") == 1
    page.press("open sesame", Keys.ENTER)
    page.wait("return document.querySelectorAll('#model option').length")
    page.send("hello")
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.message').length === 2")
    assert page.js("return localStorage.length ? JSON.stringify(localStorage).includes('sesame') : false") is False
    page.open("/#/runs/ghost", "return Boolean(document.querySelector('iframe')?.contentDocument.querySelector('h1'))")


# ── the list of conversations ─────────────────────────────────────────────────────────────────────────────────────────


def start_three_conversations(page):
    for words in ("Pears in the garden", "A roof of slate", "Salt and the sea"):
        page.click("#new-chat")
        page.send(words)
    page.wait("return document.querySelectorAll('#conversations a').length === 3")


def test_search_rename_delete_and_undo(page):
    start_three_conversations(page)
    page.one("#search").send_keys("SAID: A ROOF")
    page.wait("return document.querySelectorAll('#conversations a').length === 1")
    assert page.one("mark").text.lower() == "said: a roof"
    assert page.titles() == ["A roof of slate"]
    page.press(Keys.ENTER)
    page.wait("return document.querySelector('.content').textContent === 'A roof of slate'")
    page.one("#search").send_keys("xyzzy")
    page.wait("return document.getElementById('search-status').textContent === 'No results.'")
    page.one("#search").send_keys(Keys.ESCAPE)
    page.wait("return document.querySelectorAll('#conversations a').length === 3")
    page.click("#more summary")
    page.click("[data-do=rename]")
    page.wait("return document.activeElement.className === 'rename'")
    page.press("The old roof", Keys.ENTER)
    page.wait("return document.getElementById('title').textContent === 'The old roof'")
    page.click("#more summary")
    page.click("[data-do=delete]")
    page.wait(
        "return document.querySelectorAll('#conversations a').length === 2"
        " && document.querySelectorAll('.message').length === 0"
    )
    page.click(".toast button")
    page.wait(
        "return document.querySelectorAll('#conversations a').length === 3"
        " && document.querySelectorAll('.message').length === 2"
    )
    assert "The old roof" in page.titles()


def test_renaming_and_deleting_during_a_reply(page):
    page.send("forever", wait=False)
    page.wait("return document.querySelectorAll('#conversations a').length === 1")
    page.click("#more summary")
    page.click("[data-do=rename]")
    page.wait("return document.activeElement.className === 'rename'")
    page.press("Endless", Keys.ENTER)
    page.wait("return document.getElementById('title').textContent === 'Endless' && document.querySelector('.writing')")
    page.wait("return document.querySelector('.writing').textContent.includes('Word 20')")
    assert page.stored()[0]["title"] == "Endless"
    page.click("#more summary")
    page.click("[data-do=delete]")
    page.wait("return !document.querySelector('.message')")
    time.sleep(0.6)
    assert page.stored() == [], "the rest of the reply does not save it again"
    page.click(".toast button")
    page.wait("return document.querySelectorAll('.message').length === 2 && !document.querySelector('.writing')")


def test_two_tabs_stay_in_sync(page):
    page.send("here")
    first = page.browser.current_window_handle
    address = page.browser.current_url
    page.browser.switch_to.new_window("tab")
    page.browser.get(address)
    page.wait("return document.querySelectorAll('.message').length === 2")
    page.send("there")
    page.browser.close()
    page.browser.switch_to.window(first)
    page.wait("return document.querySelectorAll('.message').length === 4")
    assert page.texts()[2:] == ["there", "You said: there"]


def downloaded(page, name):
    folder = Path(page.browser.capabilities["chrome"]["userDataDir"]).parent
    until = time.time() + 20
    while not (folder / name).exists():
        assert time.time() < until, f"{name} was not saved"
        time.sleep(0.02)
    return folder / name


def test_export_and_import_restore_conversations(page):
    start_three_conversations(page)
    page.send("tool")
    page.send("lookup")
    page.click(".message:last-child [aria-label='Regenerate reply']")
    page.wait("return document.querySelector('.message:last-child .count')?.textContent === '2 / 2'")
    page.idle()
    before = page.stored()
    page.click("#export-all")
    file = downloaded(page, "conversations.json")
    assert len(json.loads(file.read_text())["conversations"]) == 3
    page.later(
        "const store = await import('/static/store.js');"
        " for (const one of await store.loadAll()) await store.remove(one.id);"
    )
    page.open()
    page.wait("return document.getElementById('search-status').textContent === 'No conversations yet.'")
    for notification in ("3 conversations imported.", "0 conversations imported; 3 already up to date."):
        page.one("#file").send_keys(str(file))
        page.wait("return document.getElementById('toast').textContent === arguments[0]", notification)
    assert page.stored() == before
    page.js("document.querySelector('#conversations a').click()")
    page.wait("return document.querySelectorAll('.message').length === 6")
    page.click("#more summary")
    page.click("[data-do=markdown]")
    written = downloaded(page, "Salt and the sea.md").read_text()
    assert written.startswith("# Salt and the sea\n\n**You**\n\nSalt and the sea")
    assert "It is **391**." in written
    page.click("#more summary")
    page.click("[data-do=json]")
    assert len(json.loads(downloaded(page, "Salt and the sea.json").read_text())["conversations"]) == 1


def test_imported_files_are_validated_field_by_field(empty):
    read = (
        "const store = await import('/static/store.js');"
        " try { return store.fromJson(given[0]); } catch (e) { return e.message; }"
    )
    assert "not JSON" in empty.later(read, "{")
    assert "no nanoghost conversations" in empty.later(read, "[]")
    nodes = {
        "a": {"id": "a", "parent": "root", "role": "user", "text": "hi", "extra": 1},
        "b": {
            "id": "b",
            "parent": "a",
            "role": "assistant",
            "model": 5,
            "parts": [{"text": "yes"}, 3, {"call": {"name": "x"}}],
            "timings": {"a": "b"},
        },
        "c": {"id": "c", "parent": "d", "role": "user", "text": "in a circle"},
        "d": {"id": "d", "parent": "c", "role": "user", "text": "in a circle"},
        "e": {"id": "__proto__", "parent": "root", "role": "user", "text": {}},
    }
    nodes["f"] = {"id": '"] quoted', "parent": "root", "role": "user", "text": "not a name"}
    file = {
        "format": "nanoghost-conversations",
        "version": 1,
        "conversations": [{"id": 7, "tree": {"nodes": nodes}, "settings": {"temperature": "hot"}}, None],
    }
    first, second = empty.later(read, json.dumps(file))
    assert {"a", "b"} <= set(first["tree"]["nodes"]) <= {"a", "b", "__proto__"}
    assert "extra" not in first["tree"]["nodes"]["a"]
    assert first["settings"]["temperature"] == 0.7
    assert isinstance(first["id"], str)
    assert second["title"] == "Untitled"
    assert second["tree"] == {"nodes": {}, "chosen": {}}


# ── appearance and accessibility ──────────────────────────────────────────────────────────────────────────────────────


def test_the_theme_follows_the_system_or_the_button(page):
    color = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(color)
    page_browser.theme(page.browser, "dark")
    dark = page.js(color)
    assert dark != light
    page.click("#theme")
    assert page.js(color) == light
    page.browser.refresh()
    assert page.js(color) == light, "the choice is stored"


def test_a_phone_never_scrolls_sideways(page):
    page_browser.resize(page.browser, 375, 720, phone=True)
    page.server.answers["wide"] = lambda: text(
        "```\n"
        + "x" * 400
        + "\n```\n\n"
        + "y" * 400
        + "\n\n|"
        + " wide |" * 30
        + "\n|"
        + "---|" * 30
        + "\n\nhttps://example.com/"
        + "z" * 300
    )
    page.send("wide")
    page.send("w" * 300)
    width = (
        "const right = (e) => e.getBoundingClientRect().right;"
        " return Math.max(document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth,"
        " ...[...document.querySelectorAll('.message, #composer')].map(right))"
    )
    assert page.js(width) <= 375
    side = "return document.getElementById('sidebar').getBoundingClientRect().right"
    assert page.js(side) <= 0
    page.click("#menu")
    page.wait(side + " > 200")
    assert page.js("return document.getElementById('main').inert")
    assert page.js(width) <= 375
    page.press(Keys.ESCAPE)
    page.wait(side + " <= 0")
    for address in ("#/runs", "#/runs/ghost-new", "#/runs/ghost"):
        page.js("location.hash = arguments[0]", address)
        page.wait("return document.querySelector('.runs, .chart, iframe')")
        assert page.js("return document.documentElement.scrollWidth") <= 375
        assert page.js("const e = document.getElementById('runs-view'); return e.scrollWidth <= e.clientWidth")


def test_everything_works_with_the_keyboard_alone(page):
    page.press("first", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "line two", Keys.ENTER)
    page.idle()
    assert page.texts()[0] == "first\nline two"
    page.press(Keys.ARROW_UP)
    page.wait("return document.activeElement.closest('.edit')")
    page.press(" more", Keys.ENTER)
    page.wait("return document.querySelector('.user .count')?.textContent === '2 / 2'")
    page.idle()
    page.press(Keys.CONTROL, "k")
    assert page.js("return document.activeElement.id") == "search"
    page.press(Keys.ENTER)
    page.wait("return document.querySelectorAll('.message').length === 0 && document.activeElement.id === 'message'")
    page.press(Keys.CONTROL, "k")
    page.press(Keys.ARROW_DOWN)
    page.press(Keys.ENTER)
    page.wait("return document.querySelectorAll('.message').length === 2")
    page.js("document.activeElement.blur()")
    page.one("body").send_keys("?")
    assert page.js("return document.getElementById('keys-sheet').open")
    page.press(Keys.ESCAPE)
    page.js("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.js("const e = document.activeElement; return e.id || e.ariaLabel || e.textContent.trim()"))
        ring = page.js(
            "const e = document.activeElement; const s = getComputedStyle(e); return e === document.body"
            " || s.outlineStyle !== 'none' || e.closest('.box') !== null || s.outlineWidth"
        )
        assert ring
    assert reached[0] == "skip"
    expected = {
        "new-chat",
        "search",
        "models",
        "import",
        "export-all",
        "theme",
        "help",
        "menu",
        "message",
        "model",
        "settings",
        "Previous version",
        "Regenerate reply",
        "Copy reply",
    }
    assert expected <= set(reached), expected - set(reached)
    page.js("document.getElementById('skip').focus()")
    page.press(Keys.ENTER)
    assert page.js("return document.activeElement.id") == "message"


def test_screen_readers_get_whole_sentences(page):
    page.js("""
        window.heard = [];
        const record = (node) => window.heard.push(node.textContent);
        new MutationObserver((mutations) => mutations.forEach(({ addedNodes }) => addedNodes.forEach(record)))
          .observe(document.getElementById('live'), {childList: true})""")
    page.send("sentences")
    assert page.js("return window.heard") == [
        "smollm2 is replying.",
        "The first sentence.",
        "The second one is here.",
        "And the rest",
    ]
    assert page.one("#live").get_attribute("aria-live") == "polite"


def test_scrolling_follows_a_reply_only_at_the_end(page):
    end = "const e = document.getElementById('scroller'); return e.scrollHeight - e.scrollTop - e.clientHeight"
    page.server.answers["verse"] = lambda: text(*(f"line {n}\n\n" for n in range(400)), pause=0.01)
    page.send("verse", wait=False)
    page.wait("return document.querySelector('.writing').textContent.includes('line 60')")
    assert page.js(end) < 80
    page.js("document.getElementById('scroller').scrollTop = 0")
    page.wait("return !document.getElementById('to-end').hidden")
    page.wait("return document.querySelector('.writing').textContent.includes('line 160')")
    assert page.js("return document.getElementById('scroller').scrollTop") == 0
    page.click("#to-end")
    page.wait("return document.querySelector('.writing').textContent.includes('line 200')")
    assert page.js(end) < 80
    page.click("#send")


def test_a_long_reply_is_drawn_block_by_block(page):
    page.js("""
        window.built = 0;
        const count = ({ addedNodes }) => window.built += addedNodes.length;
        new MutationObserver((mutations) => mutations.forEach(count))
          .observe(document.getElementById('thread'), {childList: true, subtree: true})""")
    page.send("long", wait=False)
    page.idle()
    assert page.js("return document.querySelectorAll('.assistant h4').length") == 400
    assert page.js("return window.built") < 12 * 400, "each block is built about once, not for every delta"
    page.js("document.querySelector('.assistant').marked = true; document.querySelector('.user').marked = true")
    page.send("short")
    page.js("document.querySelector('.message:last-child [aria-label=\"Regenerate reply\"]').click()")
    page.wait("return document.querySelector('.message:last-child .count')?.textContent === '2 / 2'")
    assert page.js("return document.querySelector('.user').marked"), "unchanged messages keep their elements"


def test_code_and_replies_can_be_copied(page):
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.server.address},
    )
    page.send("markdown")
    page.click(".copy-code")
    assert page.later("return navigator.clipboard.readText();") == "print(1)"
    page.click("[aria-label='Copy reply']")
    assert page.later("return navigator.clipboard.readText();").startswith("# Title")


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reports_and_growing_training_curves_of_models(page):
    page.server.report += "<img src=x onerror='parent.ranScript = true'>"
    page.click("#models")
    page.wait("return document.querySelectorAll('.runs li').length === 3")
    assert "in training" in page.one(".runs li").text
    page.click(".runs a")
    page.wait("return document.querySelectorAll('.chart').length >= 6")
    titles = page.js("return [...document.querySelectorAll('.chart figcaption')].map((e) => e.firstChild.textContent)")
    assert {"Loss", "Reward", "Tokens per second", "Pass rate"} <= set(titles)
    assert "step 60 of 73" in page.one("#runs [role=status]").text
    color = "return getComputedStyle(document.querySelector('.chart .line')).stroke"
    light = page.js(color)
    page_browser.theme(page.browser, "dark")
    assert page.js(color) != light
    page.server.events["ghost-new"] = events(70)
    page.wait("return document.querySelector('#runs [role=status]').textContent.includes('step 70 of 73')")
    page.server.runs[0] |= {"finished": True, "report": True}
    page.wait("return Boolean(document.querySelector('iframe')?.contentDocument.querySelector('h1'))")
    frame = "const d = document.querySelector('iframe').contentDocument; "
    assert page.js(frame + "return getComputedStyle(d.querySelector('h1')).color") == "rgb(74, 91, 212)", (
        "the style of the report is applied"
    )
    assert page.js(frame + "return getComputedStyle(d.querySelector('p')).letterSpacing") == "3px"
    assert page.js("return window.ranScript") is None
    assert page.js("return window.violations.splice(0)") == ["script-src-attr inline"], "the policy blocked the script"
    assert "allow-scripts" not in page.one("iframe").get_attribute("sandbox")
    page.click(".back")
    page.wait("return document.querySelectorAll('.runs li').length === 3")
    before = len(page.server.seen)
    page.click("#new-chat")
    page.wait("return !document.getElementById('chat').hidden")
    time.sleep(2.2)
    assert not [path for _, path in page.server.seen[before:] if "events" in path], (
        "curves that are not shown are not requested"
    )
    page.open("/#/runs/nobody", "return document.querySelector('#runs .problem')")
    page.open("/#/runs/smollm2", "return document.querySelector('#runs').textContent.includes('No training curves')")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_accessibility_problem(page, theme):
    package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed: make page")
    axe = (Path(package.__file__).parent / "axe.min.js").read_text()
    page_browser.theme(page.browser, theme)
    page.server.answers["all"] = lambda: [
        *page.server.answers["lookup"](),
        *page.server.answers["markdown"](),
        *text("- a\n  1. b\n\n[x](https://example.com) ~~y~~ `z`"),
    ]

    def check(where):
        time.sleep(0.3)  # until transitions have ended
        page.js(axe + "; window.axe = axe")
        found = page.later("return (await window.axe.run()).violations;")
        serious = [
            (v["id"], n["html"][:200], n["failureSummary"])
            for v in found
            if v["impact"] in ("serious", "critical")
            for n in v["nodes"]
        ]
        assert not serious, (where, serious)

    check("empty")
    page.send("all")
    page.send("restart")
    page.click(".call summary")
    page.click(".user [aria-label^=Edit]")
    check("conversation")
    for name in ("settings", "help"):
        page.click(f"#{name}")
        check(name)
        page.press(Keys.ESCAPE)
    for address, there in (("#/runs", ".runs"), ("#/runs/ghost-new", ".chart"), ("#/runs/ghost", "iframe")):
        page.js("location.hash = arguments[0]", address)
        page.wait("return document.querySelector(arguments[0])", there)
        check(address)


# ── hostile replies ───────────────────────────────────────────────────────────────────────────────────────────────────


def requests_of(browser):
    """Addresses of all requests since the last call, from Chromium's log."""
    seen = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in seen if m["method"] == "Network.requestWillBeSent"]


ALLOWED = re.compile(r"/(static/[a-z]+\.(js|css|svg)|v1/(models|chat/completions)|people|tools|runs|empty)?(#.*)?")

ALLOWED_TAGS = set(
    "A ARTICLE BLOCKQUOTE BR BUTTON CODE DEL DETAILS DIV EM H3 H4 H5 H6 HR LI OL P PRE SPAN STRONG SUMMARY"
    " TABLE TBODY TD TH THEAD TR UL".split()
)


def test_hostile_replies_cause_no_request_no_script_and_no_hang(page):
    requests_of(page.browser)
    del page.server.seen[:]
    slowest = {}
    for number in range(len(HOSTILE)):
        page.click("#new-chat")
        page.wait("return !document.querySelector('.message')")
        page.js("""
            window.longest = 0;
            let last = performance.now();
            const mine = window.round = {};
            const look = () => {
              if (window.round !== mine) return;
              const now = performance.now();
              window.longest = Math.max(window.longest, now - last);
              last = now;
              setTimeout(look, 10);
            };
            look();""")
        started = time.time()
        page.send(f"hostile {number}", wait=False)
        page.idle()
        page.js("return document.body.offsetHeight")
        slowest[number] = (round(time.time() - started, 1), round(page.js("return window.longest")))
        links = page.js(
            "return [...document.querySelectorAll('.content a')].map((a) => [a.getAttribute('href'), a.rel, a.target])"
        )
        assert all(
            re.match(r"(https?://|mailto:)", href) and rel == "noopener noreferrer" and target == "_blank"
            for href, rel, target in links
        )
        tags = page.js("return [...document.querySelectorAll('.content *')].map((e) => e.tagName)")
        strange = set(tags) - ALLOWED_TAGS
        attributes = page.js(
            "return [...document.querySelectorAll('.content *')].flatMap((e) => e.getAttributeNames())"
            ".filter((n) => n.startsWith('on') || n === 'style' || n === 'src')"
        )
        assert not strange
        assert not attributes, number
    assert page.js("return window.ran") is None
    crowd = crowded()
    slow = {number: times for number, times in slowest.items() if times[0] > 10 * crowd or times[1] > 2500 * crowd}
    assert not slow, f"(seconds to draw, longest time in which the page did not respond): {slow}"
    requested = {url.removeprefix(page.server.address) for url in requests_of(page.browser)}
    assert requested
    assert all(ALLOWED.fullmatch(url) for url in requested), requested
    assert all(ALLOWED.fullmatch(path) for _, path in page.server.seen), page.server.seen
    page.open()
    page.one("#search").send_keys("window.ran")
    page.wait("return document.querySelectorAll('mark').length > 3")
    assert page.js("return window.ran") is None


def test_the_page_creates_no_markup_from_strings():
    for file in PAGE.glob("*.*"):
        source = file.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextualFragment|setHTML"
            r"|\beval\(|new Function|javascript:",
            source,
        ), file.name
        assert not re.search(r"https?://(?!www\.w3\.org)[a-z]", source), (
            f"{file.name} contains the address of another host"
        )
        if file.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?! [^>]*src=)", source)


# ── single modules ────────────────────────────────────────────────────────────────────────────────────────────────────


PIECES = """
const { Markdown } = await import('/static/markdown.js');
let state = given[0];
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
    wrong = empty.later(
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
    wrong = empty.later(
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
    markup = empty.later(
        """
        const { Markdown } = await import('/static/markdown.js');
        return given[0].map((source) => {
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
    shown = empty.later("""
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
    results = empty.later("""
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
