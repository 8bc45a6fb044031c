"""The chat: messages, replies, branches, settings, tool calls, errors."""

import time

import pytest

KEYS_MODULE = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed: make page")
Keys = KEYS_MODULE.Keys


def test_a_reply_survives_a_reload(page):
    page.send("Hello there, ghost")
    assert page.texts() == ["Hello there, ghost", "You said: Hello there, ghost"]
    assert "187 tokens/s" in page.find(".figures").text
    assert "context 412 of 2,048" in page.find(".figures").text
    body = page.server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Hello there, ghost"}]
    assert body["stream"]
    assert body["timings"]
    fields = {"model", "messages", "stream", "timings", "stream_options", "temperature", "top_p", "max_tokens"}
    assert set(body) == fields | {"server_tools"}, "the server rejects unknown fields"
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
    assert "stopped" in page.find(".figures").text
    until = time.time() + 20
    while not page.server.num_aborted:
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
    page.new_chat()
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
    assert page.find(".message:last-child .count").text == "2 / 2"
    page.click(".message:last-child [aria-label='Previous version']")
    page.wait("return document.querySelector('.message:last-child .count').textContent === '1 / 2'")
    page.browser.refresh()
    page.wait("return document.querySelectorAll('.message').length === 4")
    assert [e.text for e in page.find_all(".count")] == ["1 / 2", "1 / 2"]
    page.send("third")
    assert [m["content"] for m in page.server.bodies[-1]["messages"]][::2] == ["first", "second", "third"]


def test_tools_follow_the_model_until_the_user_chooses_some(page):
    """All for a model that learned here to call them, none for one that others trained."""
    choose = "const m = document.getElementById('model'); m.value = '{}'; m.dispatchEvent(new Event('change'))"
    page.js(choose.format("smollm2"))
    page.send("one")
    page.js(choose.format("smollm2@me"))
    page.js("document.getElementById('temperature').dispatchEvent(new Event('input', {bubbles: true}))")
    page.send("two")
    page.js(choose.format("smollm2"))
    page.send("three")
    page.click("#settings")
    page.click("[name=tools][value=python]")
    page.press(Keys.ESCAPE)
    page.js(choose.format("smollm2@me"))
    page.send("four")
    everything = ["calculator", "python", "lookup"]
    assert [body["server_tools"] for body in page.server.bodies] == [[], everything, [], ["python"]]


def test_each_conversation_has_its_own_settings(page):
    page.click("#settings")
    page.find("#system").send_keys("Be brief.")
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
    assert "as maya" in page.find("#settings-summary").text
    page.new_chat()
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
    line = page.find(".call summary")
    assert line.text == "Calculated 17 * 23 → 391"
    assert not page.find(".call pre").is_displayed()
    line.click()
    assert "expression: 17 * 23" in page.find(".call").text
    page.send("next")
    roles = page.server.bodies[-1]["messages"]
    assert [m["role"] for m in roles] == ["user", "assistant", "tool", "assistant", "user"]
    assert roles[1]["tool_calls"][0]["id"] == roles[2]["tool_call_id"]
    assert roles[2]["content"] == "391"
    page.send("lookup")
    assert [e.text for e in page.find_all(".passages summary")] == [
        "1notes/garden.mdThe pear tree was planted in 1974.",
        "2notes/house.mdThe roof is from 1911.",
    ]
    cites = page.find_all(".cite")
    assert [e.text for e in cites] == ["1", "2"]
    assert "[7]" in page.texts()[-1]
    cites[0].click()
    assert "1974" in page.find(".passages details[open] blockquote").text
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
    assert error in page.find(".foot .problem").text
    assert page.texts()[1] == partial_text
    page.server.recovered = True
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
    assert "does not respond" in page.find(".foot .problem").text
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
