"""Themes, phones, keyboard, screen readers, scrolling."""

import pytest

from tests.support import page_browser
from tests.support.page_server import text

KEYS_MODULE = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed: make page")
Keys = KEYS_MODULE.Keys


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
    page.find("body").send_keys("?")
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
    assert page.find("#live").get_attribute("aria-live") == "polite"


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
    assert page.run_async("return navigator.clipboard.readText();") == "print(1)"
    page.click("[aria-label='Copy reply']")
    assert page.run_async("return navigator.clipboard.readText();").startswith("# Title")
