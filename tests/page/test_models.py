"""The view of models, and an accessibility check of all views."""

import time
from pathlib import Path

import pytest

from tests.support import page_browser
from tests.support.page_server import events, text

KEYS_MODULE = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed: make page")
Keys = KEYS_MODULE.Keys


def test_reports_and_growing_training_curves_of_models(page):
    page.server.report += "<img src=x onerror='parent.ranScript = true'>"
    page.click("#models")
    page.wait("return document.querySelectorAll('.runs li').length === 3")
    assert "in training" in page.find(".runs li").text
    page.click(".runs a")
    page.wait("return document.querySelectorAll('.chart').length >= 6")
    titles = page.js("return [...document.querySelectorAll('.chart figcaption')].map((e) => e.firstChild.textContent)")
    assert {"Loss", "Reward", "Tokens per second", "Pass rate"} <= set(titles)
    assert "step 60 of 73" in page.find("#runs [role=status]").text
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
    # Chromium 150 stops the script by the frame's sandbox, without a word; earlier ones report the policy
    assert {*page.js("return window.violations.splice(0)")} <= {"script-src-attr inline"}
    assert "allow-scripts" not in page.find("iframe").get_attribute("sandbox")
    page.click(".back")
    page.wait("return document.querySelectorAll('.runs li').length === 3")
    before = len(page.server.requests)
    page.click("#new-chat")
    page.wait("return !document.getElementById('chat').hidden")
    time.sleep(2.2)
    assert not [path for _, path in page.server.requests[before:] if "events" in path], (
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
        found = page.run_async("return (await window.axe.run()).violations;")
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
