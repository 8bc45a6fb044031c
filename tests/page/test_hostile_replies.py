"""Replies of a hostile model, and how the page is built to withstand them."""

import json
import re
import time

from tests.support.page_hostile import HOSTILE
from tests.support.page_server import PAGE
from tests.support.serving import crowded


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
    del page.server.requests[:]
    slowest = {}
    for number in range(len(HOSTILE)):
        page.new_chat()
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
    assert all(ALLOWED.fullmatch(path) for _, path in page.server.requests), page.server.requests
    page.open()
    page.find("#search").send_keys("window.ran")
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
