"""The page in a real browser: headless Chromium whose microphone plays a real recording.

Skipped where there is no Chromium (Debian: apt-get install chromium). Screenshots go to `BLSP_SCREENSHOTS`
(default: pytest's folder), so that a person can look at what the tests saw.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Running, running, wav

from blsp.data.audio import load_audio
from blsp.inference.listener import Listener

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

RECORDING = Path(__file__).parents[2] / "examples" / "speech"
QUIET_START = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FAKE_MICROPHONE = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
CONTROLS = "button, input, textarea, select, a[href]"
TOO_WIDE = """[...document.body.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth).map(e => e.outerHTML)"""


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real recording as the WAV file that Chromium's fake microphone plays over and over."""
    recording = max(RECORDING.rglob("*.opus"), key=lambda path: path.stat().st_size)
    path = tmp_path_factory.mktemp("microphone") / "speech.wav"
    path.write_bytes(wav(np.asarray(load_audio(recording)), 16_000))
    return path


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("BLSP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Any]]:
    """Start a Chromium with more flags."""
    with playwright.sync_playwright() as driver:
        yield lambda *flags: driver.chromium.launch(executable_path=CHROMIUM, args=[*QUIET_START, *flags])


@pytest.fixture(scope="module")
def listening(launch, microphone: Path) -> Iterator[Any]:
    with launch(*FAKE_MICROPHONE, f"--use-file-for-fake-audio-capture={microphone}") as chromium:
        yield chromium


@pytest.fixture(scope="module")
def server(listener: Listener) -> Iterator[Running]:
    with running(listener, asr="embedded:whisper-tiny.en:ct2") as each:
        yield each


@pytest.fixture
def page(listening: Any, server: Running) -> Iterator[Any]:
    """The page, open, with a microphone; the test fails if a script does."""
    context = listening.new_context(viewport={"width": 1100, "height": 800}, permissions=["microphone"])
    errors: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    visit(opened, server)
    yield opened
    context.close()
    assert errors == []


def visit(page: Any, server: Running) -> None:
    page.goto(server.url)
    playwright.expect(page.locator("#model")).not_to_have_text("connecting…")


def speak(page: Any, milliseconds: int = 900) -> None:
    box = page.locator("#talk").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    playwright.expect(page.locator("#talklabel")).to_contain_text("Listening", timeout=30_000)
    page.wait_for_timeout(milliseconds)
    page.mouse.up()


def answered(page: Any, answers: int) -> None:
    """All `answers` are there and none is still being written."""
    texts = page.locator(".answer .text")
    playwright.expect(texts).to_have_count(answers, timeout=60_000)
    playwright.expect(page.locator('.answer .text[aria-busy="true"]')).to_have_count(0, timeout=60_000)
    playwright.expect(page.locator("#send")).to_be_visible(timeout=60_000)


def violations(page: Any) -> list[str]:
    found = axe.Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found]


def test_speech_is_answered_and_a_second_turn_follows(page, screenshots: Path) -> None:
    assert violations(page) == []
    page.screenshot(path=screenshots / "1-start.png")
    speak(page)
    answered(page, 1)
    playwright.expect(page.locator(".answer .timing")).to_contain_text("first token")
    playwright.expect(page.get_by_role("img", name="Waveform")).to_have_count(1)
    page.screenshot(path=screenshots / "2-answered.png")
    page.fill("#text", "And in other words?")
    page.keyboard.press("Enter")
    answered(page, 2)
    assert page.locator(".turn").count() == 2
    assert violations(page) == []


def test_the_level_moves_while_one_speaks(page) -> None:
    box = page.locator("#talk").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    playwright.expect(page.locator("#talklabel")).to_contain_text("Listening")
    page.wait_for_timeout(700)
    drawn = page.locator("#level").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)"
    )
    page.mouse.up()
    answered(page, 1)
    assert drawn


def test_a_timer_runs_while_one_speaks(page) -> None:
    page.click("#talk")
    playwright.expect(page.get_by_role("timer")).not_to_have_text("0:00", timeout=30_000)
    page.keyboard.press("Escape")
    playwright.expect(page.get_by_role("timer")).to_be_hidden()


def test_an_example_is_sent_and_heard_copied_and_asked_again(page, server: Running) -> None:
    examples = page.locator(".example")
    recordings = {f"{each.get_attribute('data-clip')}.opus": each.inner_text() for each in examples.all()}
    rows = map(json.loads, (RECORDING / "questions.jsonl").read_text().splitlines())
    assert recordings == {Path(row["audio"]).name: row["text"] for row in rows}
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url.rstrip("/"))
    page.get_by_role("button", name="capital of Canada").click()
    answered(page, 1)
    playwright.expect(page.locator(".heard")).to_contain_text("It heard", timeout=30_000)
    page.evaluate(f"({ANSWERS})('**Ottawa**, again')")
    page.get_by_role("button", name="Try again").click()
    playwright.expect(page.locator(".answer .text")).to_have_text("Ottawa, again", timeout=30_000)
    answered(page, 1)
    assert [turn["role"] for turn in page.evaluate("window.asked")[0]["messages"]] == ["user"]
    page.get_by_role("button", name="Copy").click()
    playwright.expect(page.locator(".copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "**Ottawa**, again"


def test_compare_says_that_a_written_question_has_nothing_to_compare(page) -> None:
    page.evaluate(f"({ANSWERS})('yes')")
    page.check("#compare")
    page.fill("#text", "Hello?")
    page.press("#text", "Enter")
    playwright.expect(page.locator(".heard")).to_contain_text("Nothing was compared")


MARKDOWN = """## Ottawa
It is **the *capital*** of `Canada`:
- first
- <img src=x onerror="window.broken=1">
7. seven

```
if a < b: <script>window.broken=1</script>
```
[a page](https://example.org/) [none](javascript:window.broken=1) 2 * 3 * 4 snake_case_name"""


def test_markdown_becomes_elements_and_html_stays_text(page) -> None:
    page.evaluate(f"({ANSWERS})({json.dumps(MARKDOWN)})")
    page.fill("#text", "Hello?")
    page.press("#text", "Enter")
    answered(page, 1)
    text = page.locator(".answer .text")
    assert text.evaluate("t => [...t.children].map(e => e.tagName)") == ["H3", "P", "UL", "OL", "PRE", "P"]
    assert text.evaluate("t => t.querySelectorAll('img, script, [onerror]').length") == 0
    assert [link.get_attribute("href") for link in text.locator("a").all()] == ["https://example.org/"]
    assert text.locator("strong").inner_text() == "the capital" and text.locator("ol").get_attribute("start") == "7"
    assert "<img" in text.inner_text() and "[none](javascript" in text.inner_text()
    assert text.inner_text().endswith("2 * 3 * 4 snake_case_name")
    assert page.evaluate("window.broken") is None
    assert violations(page) == []


WIDTHS = (320, 375, 768, 1024, 1440, 1920)
LONG = (
    MARKDOWN
    + "\n\n"
    + "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz" * 2
    + "\n\n"
    + "and more words " * 60
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_is_accessible_and_whole(page, scheme: str, screenshots: Path) -> None:
    """An answer of several kinds of blocks and the settings, by axe and by what lies outside of the window."""
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(f"({ANSWERS})({json.dumps(LONG)})")
    page.fill("#text", "What is the capital of Canada, please? " * 4)
    page.press("#text", "Enter")
    answered(page, 1)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(TOO_WIDE) == [], width
        assert violations(page) == [], width
        page.screenshot(path=screenshots / f"6-{scheme}-{width}.png", full_page=True)
    for width in (WIDTHS[0], WIDTHS[-1]):
        page.set_viewport_size({"width": width, "height": 800})
        page.click("#options")
        assert violations(page) == [] and page.evaluate(TOO_WIDE) == [], width
        assert bottom(page, "#done") < bottom(page, "#settings") <= 800, "the button is seen without scrolling"
        page.screenshot(path=screenshots / f"7-settings-{scheme}-{width}.png")
        page.keyboard.press("Escape")


def test_the_keyboard_alone_reaches_and_works_everything(page) -> None:
    """Tab passes every control in the order of the page, with an outline; Enter and Space work them."""
    visible = f"[...document.querySelectorAll('{CONTROLS}')].filter(e => e.offsetParent)"
    wanted = page.evaluate(f"{visible}.map(e => e.id || e.dataset.clip)")
    at = "const e = document.activeElement, name = e.id || e.dataset.clip"
    passed, outlined = [], set()
    for _ in wanted:
        page.keyboard.press("Tab")
        name, style = page.evaluate(
            f"() => {{ {at}; return [name, getComputedStyle(e.closest('.file') || e).outlineStyle]; }}"
        )
        passed.append(name)
        outlined.add(style)
    assert passed == wanted and outlined == {"solid"}
    page.locator("#compare").focus()
    page.keyboard.press("Space")
    assert page.locator("#compare").is_checked()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the settings
    playwright.expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "options", "the focus comes back"
    page.evaluate(f"({ANSWERS})('yes')")
    page.locator(".example").first.focus()
    page.keyboard.press("Enter")
    answered(page, 1)
    page.locator("#fresh").focus()
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 0


def test_the_page_follows_a_long_answer_until_the_reader_scrolls_up(page) -> None:
    page.evaluate(f"({ANSWERS})(Array.from({{length: 50}}, (_, i) => `line ${{i}}`).join('\\n\\n'), 15)")
    left = "document.documentElement.scrollHeight - innerHeight - scrollY"
    page.fill("#text", "Count.")
    page.press("#text", "Enter")
    playwright.expect(page.locator(".answer .text")).to_contain_text("line 20", timeout=30_000)
    assert page.evaluate(left) < 100
    page.mouse.move(500, 300)
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(300)
    stays = page.evaluate("scrollY")
    answered(page, 1)
    assert page.evaluate("scrollY") == stays and page.evaluate(left) > 200
    assert page.locator("header").bounding_box()["y"] == 0, "the header stays"


@pytest.mark.parametrize("width", [320, 768, 1920])
def test_one_line_of_controls_and_nothing_cut_off(page, width: int, screenshots: Path) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate(TOO_WIDE) == []
    middles = page.evaluate(
        "[...document.querySelectorAll('.row > :not(.hidden, [hidden])')]"
        ".map(e => e.getBoundingClientRect()).map(r => r.top + r.height / 2)"
    )
    assert len(middles) == 4 and max(middles) - min(middles) < 2
    cut = (
        "[...document.querySelectorAll('.hint, .hint *, button')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert page.evaluate(cut) == 0
    page.screenshot(path=screenshots / f"6-{width}.png")
    page.click("#talk")
    playwright.expect(page.locator("#talklabel")).to_contain_text("press to send")
    assert page.locator("#talklabel").bounding_box()["width"] > 80 and page.evaluate(TOO_WIDE) == []
    page.screenshot(path=screenshots / f"6-{width}-listening.png")
    page.keyboard.press("Escape")


def test_compare_shows_three_routes(page, screenshots: Path) -> None:
    page.check("#compare")
    page.click("#options")
    page.select_option("#preset", label="repeat")
    assert violations(page) == []
    page.click("#done")
    speak(page, milliseconds=3000)
    answered(page, 3)
    assert [card.get_attribute("data-route") for card in page.locator(".answer").all()] == ["speech", "cascade", "text"]
    assert bottom(page, ".copy") == bottom(page, ".retry"), "one line of buttons"
    heard = page.locator(".transcript input").input_value()
    assert len(heard.split()) > 2, "the recogniser wrote what the fake microphone said"
    page.fill(".transcript input", "What I really said")
    page.press(".transcript input", "Enter")
    answered(page, 3)
    playwright.expect(page.locator('.answer[data-route="text"] .timing')).to_contain_text("whole answer")
    assert violations(page) == []
    page.screenshot(path=screenshots / "3-compare.png", full_page=True)


def bottom(page: Any, selector: str) -> float:
    """The lower edge of the first such element in the window, in pixels."""
    box = page.locator(selector).first.bounding_box()
    return float(box["y"] + box["height"])


def test_a_file_a_reload_and_a_phone_in_the_dark(page, server: Running, microphone: Path, screenshots) -> None:
    page.set_input_files("#file", microphone)
    answered(page, 1)
    visit(page, server)  # a reload forgets the conversation and works
    assert page.locator(".turn").count() == 0
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    assert page.locator("h1").bounding_box()["height"] < 30, "the title is one line, or hidden"
    page.locator("#talk").focus()
    page.keyboard.down("Space")
    playwright.expect(page.locator("#talklabel")).to_contain_text("Listening")
    page.wait_for_timeout(900)
    page.keyboard.up("Space")
    answered(page, 1)
    assert page.evaluate(TOO_WIDE) == [], "the page scrolls sideways on a phone"
    assert violations(page) == []
    page.screenshot(path=screenshots / "4-phone-dark.png")


def test_one_press_begins_and_another_sends(page) -> None:
    """For those who cannot hold a button, and for screen readers, whose clicks have no length."""
    for press in (lambda: page.click("#talk"), lambda: page.locator("#talk").evaluate("b => b.click()")):
        turns = page.locator(".turn").count()
        press()
        playwright.expect(page.locator("#talklabel")).to_contain_text("press to send")
        page.wait_for_timeout(900)
        assert page.locator(".turn").count() == turns, "it listens on"
        press()
        answered(page, turns + 1)


def test_escape_discards_what_was_said(page) -> None:
    page.click("#talk")
    page.wait_for_timeout(500)
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#talklabel")).to_have_text("Hold to talk")
    page.wait_for_timeout(300)
    assert page.locator(".turn").count() == 0


def test_two_presses_at_once_are_too_short_to_be_a_question(page) -> None:
    page.dblclick("#talk")
    playwright.expect(page.locator("#notice")).to_contain_text("too short")
    assert page.locator(".turn").count() == 0


def test_a_screen_reader_is_told_the_answer_once_it_is_whole(page) -> None:
    page.fill("#text", "Hello")
    page.keyboard.press("Enter")
    answered(page, 1)
    whole = page.locator(".answer .text").inner_text()
    assert page.locator("#spoken").inner_text().split() == f"Answer: {whole}".split()


def test_settings_are_sent_kept_and_answers_read_out(page, server: Running) -> None:
    page.click("#options")
    assert page.evaluate("document.activeElement.closest('dialog') !== null"), "the keyboard is in the dialog"
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#length", "33")
    page.check("#readout")
    page.click("#done")
    visit(page, server)  # the settings outlive a reload
    page.evaluate(f"({ANSWERS})('**Yes**')")
    page.evaluate("window.speechSynthesis.speak = (utterance) => { window.said = utterance.text; }; 0")
    page.fill("#text", "Hello?")
    page.press("#text", "Enter")
    answered(page, 1)
    request = page.evaluate("window.asked")[0]
    assert (request["temperature"], request["max_completion_tokens"]) == (0.5, 33)
    assert request["model"] == page.locator("#model").inner_text()
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.evaluate("window.said") == "Yes"


def test_a_file_that_the_server_cannot_decode_is_sent_as_the_browser_decoded_it(page, microphone: Path) -> None:
    page.evaluate(f"({ANSWERS})('heard')")
    page.evaluate("""() => {
        const answers = window.fetch;
        const refusal = JSON.stringify({ error: { message: 'audio: cannot be decoded', code: 'invalid_audio' } });
        window.sent = [];
        window.fetch = async (url, options) => {
            const asked = url.includes('chat') && JSON.parse(options.body).messages[0].content[0];
            if (asked) window.sent.push(asked.input_audio.data);
            return window.sent.length === 1 ? new Response(refusal, { status: 400 }) : answers(url, options);
        };
    }""")
    page.set_input_files("#file", RECORDING / "questions" / "capital-of-canada.opus")
    playwright.expect(page.locator(".answer .text")).to_have_text("heard", timeout=30_000)
    first, second = (base64.b64decode(each) for each in page.evaluate("window.sent"))
    assert first[:4] == b"OggS" and second[:4] == b"RIFF" and len(second) > 16_000 * 2 * 2
    assert page.locator(".answer.wrong").count() == 0


# Levels of a hum, of speech with a pause, of silence and of a click. Returns what was called, and when, in seconds.
TURNS = """async () => {
    const { Turns } = await import('./turns.js');
    const events = [];
    let now = 0;
    const told = (name) => () => events.push([name, now]);
    const turns = new Turns(told('begin'), told('end'));
    const hear = (level, seconds) => {
        for (let until = now + seconds; now < until; now += 0.003) turns.hear(level, 0.003);
    };
    const heard = [[0.002, 2], [0.2, 0.05], [0.002, 1], [0.1, 1], [0.002, 0.5], [0.1, 1], [0.002, 3]];
    for (const [level, seconds] of heard) hear(level, seconds);
    return events;
}"""


def test_turns_begin_and_end_by_voice(page) -> None:
    (begin, began), (end, ended) = page.evaluate(TURNS)
    assert (begin, end) == ("begin", "end")
    assert 3.05 < began < 3.4, "a click is no turn"
    assert 6.3 < ended < 6.7, "a pause of half a second ends none"


# The server's answers are replaced: each is `answer`, in pieces of seven characters, `wait` milliseconds apart.
ANSWERS = """(answer, wait = 0) => {
    window.asked = [];
    window.fetch = async (url, options) => {
        if (!url.includes('chat')) return new Response(JSON.stringify({ text: 'heard' }));
        window.asked.push(JSON.parse(options.body));
        const start = async (stream) => {
            for (let at = 0; at < answer.length; at += 7) {
                const chunk = { choices: [{ delta: { content: answer.slice(at, at + 7) } }] };
                stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
                if (wait) await new Promise((done) => setTimeout(done, wait));
            }
            stream.enqueue(new TextEncoder().encode('data: [DONE]\\n\\n'));
        };
        return new Response(new ReadableStream({ start }));
    };
}"""
UNFINISHED = """() => {
    window.asked = [];
    window.fetch = (url, options) => {
        if (!url.includes('chat')) return Promise.resolve(new Response(JSON.stringify({ text: 'heard' })));
        window.asked.push(JSON.parse(options.body).messages);
        const piece = 'data: {"choices": [{"delta": {"content": "partly"}}]}\\n\\n';
        const start = (stream) => {
            stream.enqueue(new TextEncoder().encode(piece));
            const stop = () => stream.error(new DOMException('stopped', 'AbortError'));
            options.signal.addEventListener('abort', stop);
        };
        return Promise.resolve(new Response(new ReadableStream({ start })));
    };
}"""


def test_to_speak_stops_the_answer_that_is_being_given(launch, server: Running, tmp_path: Path) -> None:
    """Hands-free, with real sound: the second thing said stops the answer to the first, and is answered itself."""
    quiet = np.zeros(24_000, np.float32)
    said = np.asarray(load_audio(RECORDING / "questions" / "capital-of-canada.opus"))
    (tmp_path / "said.wav").write_bytes(wav(np.concatenate([quiet, said, quiet]), 16_000))
    microphone = f"--use-file-for-fake-audio-capture={tmp_path / 'said.wav'}"
    with launch(*FAKE_MICROPHONE, microphone) as chromium:
        page = chromium.new_page()
        visit(page, server)
        page.evaluate(UNFINISHED)
        page.click("#options")
        page.check("#handsfree")
        page.click("#done")
        first, second = page.locator(".answer").nth(0), page.locator(".answer").nth(1)
        playwright.expect(first.locator(".text")).to_have_text("partly", timeout=60_000)
        playwright.expect(first.locator(".timing")).to_have_text("stopped", timeout=60_000)
        playwright.expect(second.locator(".text")).to_have_text("partly", timeout=60_000)
        asked = page.evaluate("window.asked")
        assert [turn["role"] for turn in asked[1]] == ["user", "assistant", "user"]
        assert [len(turn[-1]["content"]) for turn in asked[:2]] == [1, 1], "speech, without text"
        page.click("#talk")  # ends hands-free
        page.click("#stop")
        playwright.expect(second.locator(".timing")).to_have_text("stopped")


def test_a_new_conversation_forgets_an_answer_that_was_being_written(page) -> None:
    page.evaluate(UNFINISHED)
    for number, question in enumerate(("the old question", "a new one")):
        page.fill("#text", question)
        page.press("#text", "Enter")
        playwright.expect(page.locator("#turns .text")).to_have_text("partly")
        asked = page.evaluate("window.asked")
        assert len(asked) == number + 1 and [turn["content"] for turn in asked[-1]] == [question]
        page.click("#fresh")


def test_says_that_the_microphone_is_blocked(launch, server: Running, screenshots: Path) -> None:
    with launch("--use-fake-device-for-media-stream", "--deny-permission-prompts") as chromium:
        page = chromium.new_page()
        visit(page, server)
        press(page)
        playwright.expect(page.locator("#notice")).to_contain_text("microphone is blocked")
        page.screenshot(path=screenshots / "5-blocked.png")
        assert violations(page) == []


def test_says_that_there_is_no_microphone(launch, server: Running) -> None:
    with launch("--use-fake-ui-for-media-stream") as chromium:
        page = chromium.new_page()
        visit(page, server)
        press(page)
        playwright.expect(page.locator("#notice")).to_contain_text("No microphone was found")
        page.fill("#text", "Then I write.")
        page.keyboard.press("Enter")
        answered(page, 1)


def press(page: Any) -> None:
    box = page.locator("#talk").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.up()


def test_asks_for_the_key(server_with, listening) -> None:
    with server_with(api_key=("sesame",)) as server:
        page = listening.new_page()
        visit(page, server)
        playwright.expect(page.locator("#model")).to_have_text("not connected")
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        playwright.expect(page.locator("#model")).not_to_have_text("not connected")
        page.fill("#text", "Hello")
        page.keyboard.press("Enter")
        answered(page, 1)
        page.close()
