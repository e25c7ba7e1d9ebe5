"""The page while an answer is given: what stays typed, where the focus is, what each route is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Running
from test_page import ANSWERS, CHROMIUM, QUIET_START, RECORDING, UNFINISHED, answered, playwright, pytestmark, visit

__all__ = ["pytestmark"]  # skipped where there is no Chromium
EXAMPLE = RECORDING / "questions" / "capital-of-canada.opus"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=QUIET_START) as chromium,
    ):
        yield chromium


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The page, open; the test fails if a script does."""
    opened = browser.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    visit(opened, server)
    yield opened
    opened.close()
    assert errors == []


def write(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def begin(page: Any) -> None:
    """Ask something whose answer goes on until it is stopped."""
    page.evaluate(UNFINISHED)
    write(page, "Hello?")
    playwright.expect(page.locator(".answer .text")).to_have_text("partly")


def test_what_is_typed_during_an_answer_stays(page) -> None:
    begin(page)
    write(page, "typed meanwhile")
    playwright.expect(page.locator("#notice")).to_contain_text("An answer is being given")
    page.evaluate("async () => (await import('./conversation.js')).askSpoken(new Blob(['dropped']))")
    assert page.input_value("#text") == "typed meanwhile"
    page.click("#stop")
    playwright.expect(page.locator("#notice")).to_be_hidden()
    assert page.locator(".turn").count() == 1


def test_escape_in_the_settings_only_closes_them(page) -> None:
    begin(page)
    page.click("#options")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#settings")).to_be_hidden()
    assert page.locator("#stop").is_visible(), "the answer goes on"
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".answer .timing")).to_have_text("stopped")


FOCUSED = "document.activeElement.id || document.activeElement.className"


def test_the_keyboard_keeps_its_place_while_an_answer_is_given(page) -> None:
    page.evaluate(UNFINISHED)
    page.locator(".example").first.press("Enter")
    playwright.expect(page.locator(".answer .text")).to_have_text("partly")
    assert page.evaluate(FOCUSED) == "talk", "the examples are gone"
    assert page.get_attribute("#talk", "aria-disabled") == "true"
    page.keyboard.press("Space")
    assert page.inner_text("#talklabel") == "Hold to talk", "nothing is recorded"
    page.locator("#stop").press("Enter")
    playwright.expect(page.locator("#stop")).to_be_hidden()
    assert page.evaluate(FOCUSED) == "talk"
    assert page.get_attribute("#talk", "aria-disabled") == "false"
    page.locator(".retry").press("Enter")
    playwright.expect(page.locator("#stop")).to_be_visible()
    page.wait_for_timeout(100)
    assert page.evaluate(FOCUSED) == "retry"


def test_the_switch_is_the_browsers_own_in_forced_colours(page) -> None:
    page.emulate_media(forced_colors="active")
    style = "(e) => [getComputedStyle(e).appearance, getComputedStyle(e, '::before').content]"
    assert page.locator("#compare").evaluate(style) == ["auto", "none"]


def test_damaged_settings_are_taken_as_none(page, server: Running) -> None:
    for damaged in ("{", "null", "7"):
        page.evaluate("(text) => localStorage.setItem('settings', text)", damaged)
        visit(page, server)
        page.click("#options")
        assert page.input_value("#length") == "256"
        page.fill("#length", "33")
        page.click("#done")
        visit(page, server)
        assert page.input_value("#length") == "33"


def test_a_new_conversation_silences_and_frees_its_recordings(page) -> None:
    page.evaluate(f"({ANSWERS})('yes')")
    page.evaluate("""() => {
        const Real = window.Audio;
        window.Audio = function (address) { return (window.sound = new Real(address)); };
    }""")
    page.set_input_files("#file", EXAMPLE)
    answered(page, 1)
    page.evaluate("() => { window.sound.loop = true; return window.sound.play(); }")
    page.click("#fresh")
    assert page.evaluate("window.sound.paused")
    gone = "new Promise((done) => Object.assign(new Audio(window.sound.src), { onerror: () => done(true) }))"
    assert page.evaluate(gone)


ROUTES = """async () => {
    (await import('./conversation.js')).allowRecogniser(true);
    let number = 0;
    window.asked = [];
    window.fetch = async (url, options) => {
        if (!url.includes('chat')) return new Response(JSON.stringify({ text: 'heard' }));
        window.asked.push(JSON.parse(options.body).messages.map((turn) => turn.content));
        const chunk = { choices: [{ delta: { content: `answer ${++number}` } }] };
        return new Response(`data: ${JSON.stringify(chunk)}\\n\\ndata: [DONE]\\n\\n`);
    };
}"""


def test_each_compared_route_has_its_own_past(page) -> None:
    page.evaluate(ROUTES)
    page.check("#compare")
    page.set_input_files("#file", EXAMPLE)
    answered(page, 3)
    page.fill(".transcript input", "mended")
    page.press(".transcript input", "Enter")
    answered(page, 3)
    page.set_input_files("#file", EXAMPLE)
    answered(page, 6)
    speech, cascade, text = page.evaluate("window.asked.slice(-3)")
    assert speech[1] == "answer 1" and isinstance(speech[0], list) and isinstance(speech[2], list)
    assert cascade == ["heard", "answer 2", "heard"]
    assert text == ["mended", "answer 4", "heard"], "as it was corrected"
    write(page, "And now?")
    answered(page, 7)
    assert page.evaluate("window.asked.at(-1).slice(1)")[0] == "answer 1"
    page.set_input_files("#file", EXAMPLE)
    answered(page, 10)
    assert page.evaluate("window.asked.at(-1)") == [*text, "answer 7", "And now?", "answer 8", "heard"]


def test_a_correction_that_is_sent_twice_is_answered_once_and_can_be_stopped(page) -> None:
    page.evaluate(ROUTES)
    page.check("#compare")
    page.set_input_files("#file", EXAMPLE)
    answered(page, 3)
    page.evaluate(UNFINISHED)
    page.press(".transcript input", "Enter")
    page.press(".transcript input", "Enter")
    playwright.expect(page.locator(".answer .text").last).to_have_text("partly")
    assert len(page.evaluate("window.asked")) == 1
    page.click("#stop")
    playwright.expect(page.locator(".answer .timing").last).to_have_text("stopped")
