"""Fixtures for the tests of the chat page in a real browser, against a test server with prepared replies.

`make page` installs what they need; without Chromium or selenium, the tests are skipped.
"""

import time

import pytest

from tests.support import page_browser
from tests.support.page_server import Server

ENTER = "\ue007"  # selenium's Keys.ENTER

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
    pytest.importorskip("selenium", reason="selenium is not installed: make page")
    if not page_browser.CHROMIUM or not page_browser.DRIVER:
        pytest.skip("Chromium and its driver are not installed")
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

    def run_async(self, script, *arguments):
        """Runs the body of an async function; returns its value."""
        done = self.browser.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...args) => {{ {script} }})(...arguments)"
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

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def find_all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def click(self, selector):
        self.find(selector).click()

    def new_chat(self):
        """Start a conversation, and wait until the messages of the last one are gone."""
        self.click("#new-chat")
        self.wait("return !document.querySelector('.message')")

    def send(self, words, wait=True):
        before = self.js("return document.querySelectorAll('.message').length")
        self.find("#message").send_keys(words, ENTER)
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
        return self.run_async("const store = await import('/static/store.js'); return store.loadAll();")

    def check_errors(self):
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
    page.run_async(
        "await new Promise((done) => { const request = indexedDB.deleteDatabase('nanoghost');"
        " request.onsuccess = request.onerror = done; });"
    )
    page.open()
    yield page
    page.check_errors()
