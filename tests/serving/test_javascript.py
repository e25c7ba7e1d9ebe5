"""OpenAI's JavaScript client, in Node and in a page of another origin.

Skipped where there is no Node or Chromium, or no client: `OPENAI_JS` names its single file, an ES module (7.5.0 was
tried). The headers that the client sends are sent without it, too, by fetch().
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import spoken

CLIENT = os.environ.get("OPENAI_JS", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCRIPT = Path(__file__).with_name("openai_client.mjs")
KEY = "a-key"
needs_client = pytest.mark.skipif(not CLIENT, reason="OPENAI_JS names no file of OpenAI's JavaScript client")
HEADERS = {  # what openai-node 7.5.0 sends from a browser, beside the content type
    "Authorization": f"Bearer {KEY}",
    "X-Stainless-Arch": "unknown",
    "X-Stainless-Lang": "js",
    "X-Stainless-OS": "Unknown",
    "X-Stainless-Package-Version": "7.5.0",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Runtime": "browser:chrome",
    "X-Stainless-Runtime-Version": "156.0.0",
    "X-Stainless-Timeout": "600",
}
FETCHED = """async ([url, headers]) => {
    const body = JSON.stringify({ messages: [{ role: "user", content: "hello" }], max_tokens: 4, stream: true });
    const more = { "Content-Type": "application/json" };
    const request = { method: "POST", headers: { ...headers, ...more }, body };
    const answer = await fetch(`${url}/v1/chat/completions`, request);
    return [answer.status, await answer.text()];
}"""


@pytest.fixture
def other_origin(tmp_path: Path) -> Iterator[str]:
    """An address that serves an empty page and the client, and is not the server's."""
    (tmp_path / "index.html").write_text("<!doctype html><title>A page</title>")
    shutil.copy(SCRIPT, tmp_path / "use.mjs")
    if CLIENT:
        shutil.copy(CLIENT, tmp_path / "openai.mjs")
    handler = partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def in_a_page(origin: str, script: str, argument: Any) -> Any:
    """The value of a function of JavaScript that a page of `origin` runs."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver, driver.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
    ) as browser:  # fmt: skip
        page = browser.new_page()
        page.goto(origin)
        return page.evaluate(script, argument)


def check(found: dict[str, Any]) -> None:
    assert found["models"][0] == found["model"] == "tiny"
    assert found["whole"] == found["streamed"] == found["helper"] and found["whole"]
    assert found["usage"] == 8 and found["response"] and found["words"] == len(found["text"].split())
    assert found["translated"] == found["text"] and "-->" in found["srt"]
    assert found["refused"] == {"status": 400, "code": "unsupported_parameter", "param": "n"}
    assert found["speech"]["code"] == "not_offered" and found["missing"]["code"] == "model_not_found"


@needs_client
@pytest.mark.skipif(shutil.which("node") is None, reason="no Node on this machine")
def test_the_client_in_node(server_with, tmp_path: Path) -> None:
    question = tmp_path / "question.wav"
    question.write_bytes(spoken())
    with server_with(api_key=(KEY,)) as server:
        command = ["node", str(SCRIPT), str(Path(CLIENT).resolve()), f"{server.url}/v1", KEY, str(question)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout))


@needs_client
def test_the_client_in_a_page_of_another_origin(server_with, other_origin: str) -> None:
    script = """async ([url, key, bytes]) => {
        const [{ default: OpenAI }, { use }] = await Promise.all([import("/openai.mjs"), import("/use.mjs")]);
        return use(OpenAI, url, key, new Uint8Array(bytes));
    }"""
    with server_with(api_key=(KEY,), cors_origin=(other_origin,)) as server:
        check(in_a_page(other_origin, script, [f"{server.url}/v1", KEY, list(spoken())]))


def test_the_headers_of_the_client_pass_from_a_page_of_another_origin(server_with, other_origin: str) -> None:
    """Chromium itself asks whether they may be sent (a CORS preflight)."""
    with server_with(api_key=(KEY,), cors_origin=(other_origin,)) as server:
        status, text = in_a_page(other_origin, FETCHED, [server.url, HEADERS])
    assert status == 200 and text.endswith("data: [DONE]\n\n")


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node on this machine")
def test_the_headers_of_the_client_pass_from_node(server_with) -> None:
    script = f"({FETCHED})(JSON.parse(process.argv[1])).then((found) => console.log(JSON.stringify(found)))"
    with server_with(api_key=(KEY,)) as server:
        command = ["node", "-e", script, json.dumps([server.url, HEADERS | {"X-Stainless-Runtime": "node"}])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    status, text = json.loads(done.stdout)
    assert status == 200 and text.endswith("data: [DONE]\n\n")
