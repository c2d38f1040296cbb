"""The page at /: its files and headers, and in a real browser a chat and the engine's view."""

from __future__ import annotations

import asyncio
import re
import time
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from headless_chromium import Page, chromium_page, find_chromium
from server_on_a_thread import RunningServer, running_server

from jaxllm.async_engine import AsyncEngine
from jaxllm.server.page import FILES, FOLDER, ROUTES

CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs an installed chromium (Debian: apt-get install chromium)"
)


async def get(url: str) -> tuple[int, str, dict[str, str]]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text(), dict(response.headers)


# ---- files


@pytest.mark.parametrize("route", ROUTES)
async def test_file_is_served_as_it_is_in_the_package(route: str, base_url: str) -> None:
    status, text, headers = await get(base_url + route)
    name = ROUTES[route]
    assert (status, text) == (200, (FOLDER / name).read_text("utf-8"))
    assert headers["Content-Type"] == f"{FILES[name]}; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"].split("; ")
    assert "default-src 'self'" in policy
    assert not re.search(r"unsafe|\*|https?:|data:", headers["Content-Security-Policy"])


async def test_nothing_else_of_the_folder_is_served(base_url: str) -> None:
    for name in ("", "nothing.js", "../page.py", "%2e%2e/page.py", "..%2fpage.py"):
        status, _, _ = await get(f"{base_url}/page/{name}")
        assert status == 404, name


def test_every_file_is_listed_and_every_reference_is_a_file() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    for name in FILES:
        text = (FOLDER / name).read_text("utf-8")
        for reference in re.findall(r'(?:href|src|from)[= ]"([^"]+)"', text):
            assert re.sub(r"^(\./|/page/)", "", reference) in FILES, (name, reference)


def test_files_name_no_other_host_and_make_no_html() -> None:
    for name in FILES:
        text = (FOLDER / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)(^|\s)//\s.*$", "", text), name
        forbidden = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|style=|\son\w+="
        )
        assert not re.search(forbidden, text), name


def test_files_are_package_data() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    data = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]
    assert data["jaxllm.server"] == ["page/*"]


async def test_page_is_open_where_routes_need_a_key() -> None:
    def start() -> AsyncEngine:
        raise RuntimeError("this server needs no engine")

    with running_server(start, api_key=("secret",)) as server:
        assert (await get(f"{server.base_url}/"))[0] == 200
        assert (await get(f"{server.base_url}/page/app.js"))[0] == 200
        assert (await get(f"{server.base_url}/debug/engine"))[0] == 401


# ---- browser


@pytest.fixture
async def page(server: RunningServer, tmp_path: Path) -> AsyncIterator[Page]:
    """The page of the shared server, ready to be written to."""
    assert CHROMIUM is not None
    async with chromium_page(CHROMIUM, tmp_path) as opened:
        await opened.open(f"{server.base_url}/")
        await opened.until("document.querySelector('#model').value === 'tiny'")
        yield opened
        assert opened.errors == []
        assert all(url.startswith(server.base_url) for url in opened.requested)
    await asyncio.to_thread(server.wait_idle)


async def fill(page: Page, **settings: object) -> None:
    for name, value in settings.items():
        await page.run(f"document.querySelector('[name={name}]').value = {value!r}")


async def set_hidden(page: Page, value: str) -> None:
    options = f"{{value: {value}, configurable: true}}"
    await page.run(f"void Object.defineProperty(document, 'hidden', {options})")
    await page.run("void document.dispatchEvent(new Event('visibilitychange'))")


def slow_down(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty milliseconds a step: an answer that can be watched."""
    runner = server.engine.running.engine.runner
    execute = runner.execute

    def slow_execute(batch: Any) -> Any:
        time.sleep(0.02)
        return execute(batch)

    monkeypatch.setattr(runner, "execute", slow_execute)


async def colours_of_map(page: Page) -> set[str]:
    """The colours of the map's cells, as a style sheet would name them."""
    script = """(() => {
        const canvas = document.querySelector('#blocks');
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        const colours = new Set();
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] === 255) colours.add(`rgb(${data[i]}, ${data[i+1]}, ${data[i+2]})`);
        return [...colours];
    })()"""
    return set(await page.run(script))


async def ask(page: Page, text: str) -> None:
    await page.type("#input", text)
    await page.click("#send")


ANSWERED = "!document.querySelector('.running') && document.querySelectorAll('.assistant').length"


@needs_chromium
async def test_message_streams_the_answer_the_api_gives(page: Page, base_url: str) -> None:
    await fill(page, temperature="0", max_tokens="24", system="Be brief.")
    await ask(page, "Hello")
    await page.until(f"{ANSWERED} === 1")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": asked, "temperature": 0, "max_tokens": 24}
    async with aiohttp.ClientSession() as session:
        url = f"{base_url}/v1/chat/completions"
        async with session.post(url, json=body) as response:
            answer = await response.json()
    expected = answer["choices"][0]["message"]["content"]
    shown = await page.run("document.querySelector('.assistant .body').textContent")
    assert shown == expected
    footer = await page.text(".assistant footer")
    assert f"{answer['usage']['prompt_tokens']} → 24 tokens" in footer
    assert "ended by length" in footer


@needs_chromium
async def test_stop_ends_the_answer_and_frees_its_blocks(
    page: Page, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(page, temperature="0", max_tokens="200")
    slow_down(server, monkeypatch)
    await ask(page, "Tell me everything")
    await page.until("document.querySelector('.assistant .body')?.textContent")
    assert server.context.live
    await page.click("#stop")
    await page.until("document.querySelector('.assistant footer').textContent === 'stopped'")
    await asyncio.to_thread(server.wait_idle, 2)  # the answer would have taken 4 s
    assert await page.run("document.querySelector('#stop').hidden")
    assert await page.text(".assistant .body")


@needs_chromium
async def test_block_map_shows_who_uses_what(
    page: Page, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(page, temperature="0", max_tokens="150")
    await page.until("document.querySelector('#num-used').textContent === '0'")
    idle = await colours_of_map(page)
    slow_down(server, monkeypatch)
    await ask(page, "A question")
    await page.until("document.querySelectorAll('#requests li').length === 1")
    assert await page.text("#num-running") == "1"
    assert int(await page.text("#num-used")) > 0
    swatch = await page.run(
        "getComputedStyle(document.querySelector('#requests .swatch')).backgroundColor"
    )
    assert swatch in await colours_of_map(page)
    assert swatch not in idle
    await page.click("#stop")
    await page.until("document.querySelector('#num-used').textContent === '0'")
    assert swatch not in await colours_of_map(page)
    counts = [int(await page.text(f"#num-{state}")) for state in ("used", "cached", "free")]
    assert sum(counts) == server.engine.running.engine.config.num_blocks


@needs_chromium
async def test_markup_stays_text(page: Page) -> None:
    attack = "<img src=x onerror='window.hit=1'><script>window.hit=2</script>"
    await fill(page, temperature="0", max_tokens="4")
    await ask(page, attack)
    await page.until(f"{ANSWERED} === 1")
    # the same from the model: a stream as the server would send it
    chunk = f'{{"choices":[{{"delta":{{"content":"{attack}","reasoning":"{attack}"}}}}]}}'
    await page.run(
        "void (window.fetch = async () => new Response("
        f"{f'data: {chunk}'!r} + '\\n\\ndata: [DONE]\\n\\n'))"
    )
    await ask(page, "again")
    await page.until(f"{ANSWERED} === 2")
    assert await page.run("document.querySelector('.user').textContent") == attack
    answer = "document.querySelectorAll('.assistant')[1].querySelector"
    assert await page.run(f"{answer}(':scope > .body').textContent") == attack
    assert await page.run(f"{answer}('.reasoning .body').textContent") == attack
    assert (
        await page.run("document.querySelectorAll('#messages img, #messages script').length") == 0
    )
    assert await page.run("window.hit ?? null") is None


@needs_chromium
async def test_refusal_of_the_server_is_shown(page: Page) -> None:
    await ask(page, "a longer prompt than the model takes " * 50)
    await page.until("!!document.querySelector('.assistant.error')")
    assert "256" in await page.text(".assistant footer")  # max_model_len
    assert len(page.errors) == 1  # the browser itself reports the 400
    page.errors.clear()


@needs_chromium
async def test_api_key_is_asked_for_and_kept_in_the_session(
    make_engine: object, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    with running_server(make_engine, api_key=("right",)) as server:  # type: ignore[arg-type]
        await asyncio.to_thread(server.wait_started)
        async with chromium_page(CHROMIUM, tmp_path) as page:
            await page.open(f"{server.base_url}/")
            await page.until("document.querySelector('#status').textContent.includes('API key')")
            await page.type("#api-key", "right")
            await page.until("document.querySelector('#status').textContent === 'ready'")
            await page.until("document.querySelector('#model').value")
            await page.send("Page.reload")
            await page.until("document.querySelector('#status')?.textContent === 'ready'")
            assert await page.run("document.querySelector('#api-key').value") == "right"
            assert await page.run("localStorage.length + document.cookie.length") == 0


@needs_chromium
async def test_hidden_page_does_not_poll(page: Page) -> None:
    await set_hidden(page, "true")
    await asyncio.sleep(0.3)  # for what is under way
    page.requested.clear()
    await asyncio.sleep(1.2)
    assert page.requested == []
    await set_hidden(page, "false")
    await asyncio.sleep(1.2)
    assert 2 <= len(page.requested) <= 4


@needs_chromium
async def test_map_fits_whatever_the_size_of_the_pool(page: Page) -> None:
    await page.run("import('/page/engine.js').then(module => void (window.view = module))")
    for count in (1, 100, 5000, 1_000_000):
        fit = await page.run(f"view.layout({count}, 350, 240)")
        cells = -(-count // fit["perCell"])
        assert fit["columns"] * fit["size"] <= 350
        assert -(-cells // fit["columns"]) * fit["size"] <= 240
        assert fit["perCell"] == 1 or count > 350 * 240 / 16  # cells are at least 3 pixels wide


@needs_chromium
async def test_cell_of_several_blocks_shows_the_busiest(page: Page) -> None:
    await page.run("import('/page/engine.js').then(module => void (window.view = module))")
    blocks = '[["free", 5, null], ["used", 1, 1], ["cached", 1, null], ["free", 4, null]]'
    snapshot = f"{{blocks: {blocks}, running: [{{id: 'a'}}, {{id: 'b'}}]}}"
    cells = await page.run(f"view.cellsOf({snapshot}, 2)")
    assert [cell["state"] for cell in cells] == ["free", "free", "used", "cached", "free", "free"]
    assert [cell["request"] for cell in cells] == [None, None, "b", None, None, None]
