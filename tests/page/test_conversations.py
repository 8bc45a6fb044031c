"""The list of conversations: search, rename, delete, tabs, export and import."""

import json
import time
from pathlib import Path

import pytest

KEYS_MODULE = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed: make page")
Keys = KEYS_MODULE.Keys


def start_three_conversations(page):
    for words in ("Pears in the garden", "A roof of slate", "Salt and the sea"):
        page.new_chat()
        page.send(words)
    page.wait("return document.querySelectorAll('#conversations a').length === 3")


def test_search_rename_delete_and_undo(page):
    start_three_conversations(page)
    page.find("#search").send_keys("SAID: A ROOF")
    page.wait("return document.querySelectorAll('#conversations a').length === 1")
    assert page.find("mark").text.lower() == "said: a roof"
    assert page.titles() == ["A roof of slate"]
    page.press(Keys.ENTER)
    page.wait("return document.querySelector('.content').textContent === 'A roof of slate'")
    page.find("#search").send_keys("xyzzy")
    page.wait("return document.getElementById('search-status').textContent === 'No results.'")
    page.find("#search").send_keys(Keys.ESCAPE)
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
    second = page.browser.current_window_handle
    page.browser.switch_to.window(first)
    page.wait("return document.querySelectorAll('.message .content')[3]?.textContent === 'You said: there'")
    assert page.texts()[2:] == ["there", "You said: there"]
    page.browser.switch_to.window(second)
    page.browser.close()
    page.browser.switch_to.window(first)


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
    page.run_async(
        "const store = await import('/static/store.js');"
        " for (const one of await store.loadAll()) await store.remove(one.id);"
    )
    page.open()
    page.wait("return document.getElementById('search-status').textContent === 'No conversations yet.'")
    for notification in ("3 conversations imported.", "0 conversations imported; 3 already up to date."):
        page.find("#file").send_keys(str(file))
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
        " try { return store.fromJson(args[0]); } catch (e) { return e.message; }"
    )
    assert "not JSON" in empty.run_async(read, "{")
    assert "no nanoghost conversations" in empty.run_async(read, "[]")
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
    first, second = empty.run_async(read, json.dumps(file))
    assert {"a", "b"} <= set(first["tree"]["nodes"]) <= {"a", "b", "__proto__"}
    assert "extra" not in first["tree"]["nodes"]["a"]
    assert first["settings"]["temperature"] == 0.7
    assert isinstance(first["id"], str)
    assert second["title"] == "Untitled"
    assert second["tree"] == {"nodes": {}, "chosen": {}}
