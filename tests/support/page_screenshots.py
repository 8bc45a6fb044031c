"""Screenshots of all views and states of the page, with prepared replies:

    python -m tests.support.page_screenshots FOLDER

With a model and questions: the page in both themes with the greedy replies of that model.

    python -m tests.support.page_screenshots FOLDER MODEL QUESTION ...
"""

import base64
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from nanoghost.bench.http_client import running_server
from tests.support import page_browser
from tests.support.page_server import Server, call, text

QUESTION = "When did we plant the pear tree, and how old was the house then?"
FOUND = [
    {
        "n": 1,
        "source": "notes/garden.md",
        "text": "Pear tree (Conference) planted in the spring of 1974, south wall. First fruit three years later.",
    },
    {"n": 2, "source": "notes/house.md", "text": "Built 1911. New roof after the storm of 1953, windows in 1988."},
]
ANSWER = """\
You planted the pear tree in the **spring of 1974**, at the south wall [1]. The house was built in 1911 [2], \
so it was 63 years old by then.

| | year | age of the house |
|---|--:|--:|
| house built | 1911 | 0 |
| new roof | 1953 | 42 |
| pear tree planted | 1974 | 63 |
"""
CODE = """Here is one that works for any two years:

```python
def age(built: int, year: int) -> int:
    \"\"\"How old a house was in some year.\"\"\"
    return year - built

print(age(1911, 1974))  # 63
```

It counts *calendar* years; a house finished in December is a little younger than it says.
"""


def answers():
    def looked_up():
        yield from call(1, "lookup", {"query": "pear tree planted"}, "two passages", passages=FOUND)
        yield from call(2, "calculator", {"expression": "1974 - 1911"}, "63")
        yield from text(ANSWER)

    return {QUESTION: looked_up, "Write that as a small function.": lambda: text(CODE)}


def say(browser, words, seconds=30):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.find_element(By.ID, "message").send_keys(words, Keys.ENTER)
    wait(
        browser, "return !document.querySelector('.writing') && document.querySelectorAll('.assistant').length", seconds
    )
    time.sleep(0.2)


def wait(browser, condition, seconds=30):
    until = time.time() + seconds
    while not browser.execute_script(condition):
        assert time.time() < until, condition
        time.sleep(0.03)


def main(folder: Path, model: str = "", *questions: str):
    if not page_browser.CHROMIUM or not page_browser.DRIVER:
        print("skipped: Chromium and its driver are not installed")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, contextlib.closing(Server()) as server:
        server.answers |= answers()
        browser = page_browser.start(place)
        try:
            if model:
                with running_server(model, 4) as (port, _):
                    take_real(browser, f"http://127.0.0.1:{port}", questions, folder)
            else:
                take_states(browser, server, folder)
                take_all(browser, server, folder)
        finally:
            browser.quit()


def take(browser, path: Path, as_it_is=False):
    if not as_it_is:
        browser.execute_script("document.activeElement.blur(); document.getElementById('scroller').scrollTop = 10**6")
    time.sleep(0.35)
    path.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]))


def take_real(browser, address, questions, folder):
    page_browser.resize(browser, 1200, 860)
    browser.get(address)
    browser.execute_script("localStorage.setItem('nanoghost-settings', '{\"temperature\": 0}')")
    browser.get(address)
    wait(browser, "return document.querySelectorAll('#model option').length")
    for question in questions:
        say(browser, question, 120)
    for theme in ("light", "dark"):
        page_browser.theme(browser, theme)
        take(browser, folder / f"page-{theme}.png")


def take_states(browser, server, folder):
    """The states of a conversation."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def picture(name):
        take(browser, folder / f"{name}.png", as_it_is=True)

    def click(selector):
        browser.find_element(By.CSS_SELECTOR, selector).click()

    def press(*keys):
        browser.switch_to.active_element.send_keys(*keys)

    page_browser.theme(browser, "light")
    page_browser.resize(browser, 1240, 860)
    browser.get(server.address)
    wait(browser, "return document.querySelectorAll('#model option').length")
    browser.find_element(By.ID, "message").send_keys("forever", Keys.ENTER)
    wait(browser, "return document.querySelector('.writing')?.textContent.includes('Word 12')")
    picture("writing")
    press(Keys.ESCAPE)
    wait(browser, "return document.querySelector('.figures')?.textContent.includes('stopped')")
    picture("stopped")
    press(Keys.ARROW_UP)
    wait(browser, "return document.activeElement.closest('.edit')")
    picture("edit")
    press(Keys.CONTROL, "a")
    press("Why is the sea salt?", Keys.ENTER)
    wait(browser, "return document.querySelector('.user .count') && !document.querySelector('.writing')")
    click(".assistant [aria-label='Regenerate reply']")
    wait(
        browser,
        "return document.querySelector('.assistant .count')?.textContent === '2 / 2'"
        " && !document.querySelector('.writing')",
    )
    picture("branches")
    browser.refresh()
    wait(browser, "return document.querySelectorAll('.message').length === 2")
    picture("reloaded")
    say(browser, "restart")
    picture("error")
    for _ in range(9):
        press(Keys.TAB)
    picture("keyboard")
    browser.find_element(By.ID, "search").send_keys("salt")
    wait(browser, "return document.querySelectorAll('mark').length")
    picture("search")
    server.key = "open sesame"
    browser.get(f"{server.address}/#/")
    browser.refresh()
    wait(browser, "return document.getElementById('key-sheet').open")
    picture("key")
    server.reset()
    server.answers |= answers()
    browser.execute_script("indexedDB.deleteDatabase('nanoghost')")


def take_all(browser, server, folder):
    def picture(name):
        take(browser, folder / f"{name}.png")

    def go(address):
        browser.execute_script("location.hash = arguments[0]", address)
        time.sleep(0.4)

    page_browser.theme(browser, "light")
    page_browser.resize(browser, 1240, 860)
    browser.get(server.address)
    wait(browser, "return document.querySelectorAll('#model option').length")
    picture("empty")
    for words in (
        "A name for a small grey cat",
        "Why is the sea salt?",
        "Sonnet about a lighthouse",
        "What did the ghost of Hamlet's father want?",
    ):
        say(browser, words)
        go("#/")
    browser.execute_script("""
        for (const box of document.querySelectorAll('[name=tools]')) if (box.value !== 'python') box.checked = true;
        document.getElementById('settings-form').dispatchEvent(new Event('input'));""")
    say(browser, QUESTION)
    picture("first")
    say(browser, "Write that as a small function.")
    for theme in ("light", "dark"):
        page_browser.theme(browser, theme)
        page_browser.resize(browser, 1200, 1120)
        picture(f"page-{theme}")
        page_browser.resize(browser, 1240, 860)
        for name in ("settings", "help"):
            browser.execute_script("document.getElementById(arguments[0]).click()", name)
            picture(f"{name}-{theme}")
            browser.execute_script("document.querySelector('dialog[open]').close()")
        here = browser.execute_script("return location.hash")
        for name, address in (("models", "#/runs"), ("curves", "#/runs/ghost-new"), ("report", "#/runs/ghost")):
            go(address)
            picture(f"{name}-{theme}")
        go(here)
    for theme in ("light", "dark"):  # last: after the phone mode, the browser has no mouse
        page_browser.theme(browser, theme)
        page_browser.resize(browser, 375, 780, phone=True, scale=2)
        picture(f"phone-{theme}")
        browser.execute_script("document.getElementById('menu').click()")
        picture(f"phone-drawer-{theme}")
        browser.execute_script("document.getElementById('backdrop').click()")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python -m tests.support.page_screenshots FOLDER [MODEL QUESTION ...]")
    main(Path(sys.argv[1]), *sys.argv[2:])
