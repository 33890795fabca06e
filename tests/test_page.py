"""The page at /: one document that needs nothing else, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from pared.compact import open_folder
from pared.reports import folder_report
from pared.runtime.async_embedder import AsyncEmbedder
from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams
from pared.runtime.server.limits import Limits
from pared.runtime.server.metrics import Metrics
from pared.runtime.server.opening import service_of
from pared.runtime.server.page import page
from pared.runtime.server.service import Service
from pared.tests import browser as chromium
from pared.tests import routed
from pared.tests.browser import Tab
from pared.tests.serving import serving
from pared.tests.test_server_embeddings import Counting

NAME = "<img src=x onerror=alert(1)>"
"""Of the model: nothing that a folder says may become markup."""


class Document(HTMLParser):
    """Tags with their attributes, and what stands in style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("style", "script"):
            self.inside.setdefault(self.tags[-1][0], data)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, device="cpu", max_batch=4, chunk=64, num_blocks=100, page=8, prefix_caching=True)


@pytest.fixture(scope="module")
def address(llm: LLM, tiny_folder: Path) -> Iterator[str]:
    service = service_of(llm, NAME, Limits())
    with open_folder(tiny_folder) as folder:
        service.folder = folder_report(folder).as_json()
    with serving(service, keys=("secret",)) as address:
        yield address


# --- the document --------------------------------------------------------------------------------


def test_it_needs_nothing_from_elsewhere() -> None:
    text = page().body.decode()
    document = Document(text)
    assert not re.search(r"https?://|//cdn|@import|url\(|\bimport\(", text)
    for tag, attributes in document.tags:
        assert not {"src", "style"} & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert "innerHTML" not in text and "eval(" not in text


def test_its_policy_lets_its_own_script_and_style_run_and_nothing_else() -> None:
    answer = page()
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in answer.headers["content-security-policy"]
    document = Document(answer.body.decode())
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(document.inside[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_script_finds_what_it_asks_for() -> None:
    document = Document(page().body.decode())
    ids = [attributes["id"] for _, attributes in document.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r"\$\(\"([\w-]+)\"\)", document.inside["script"]))
    assert len(asked) > 30 and asked <= set(ids), asked - set(ids)
    labels = {attributes.get("for") for tag, attributes in document.tags if tag == "label"}
    for tag, attributes in document.tags:
        if tag == "textarea":
            assert attributes["id"] in labels or "aria-label" in attributes


def test_the_page_is_open_and_what_it_tells_is_not(address: str) -> None:
    assert httpx.get(f"{address}/").headers["content-type"] == "text/html; charset=utf-8"
    assert httpx.get(f"{address}/info").status_code == 401


def test_info_is_what_inspect_shows(address: str, llm: LLM, tiny_folder: Path) -> None:
    told = httpx.get(f"{address}/info", headers={"Authorization": "Bearer secret"}).json()
    assert (told["model"], told["does"], told["chat"], told["family"]) == (NAME, ["generator"], True, "llama")
    assert (told["context"], told["device"], told["dtype"]) == (llm.context, "cpu", "float32")
    with open_folder(tiny_folder) as folder:
        report = folder_report(folder).as_json()
    assert told["folder"] == {name: value for name, value in report.items() if name not in ("path", "family")}
    assert str(tiny_folder) not in str(told)


def test_a_server_that_knows_no_folder() -> None:
    service = Service("lengths", Metrics(), embedder=AsyncEmbedder(Counting()))
    with serving(service) as address:
        told = httpx.get(f"{address}/info").json()
    assert (told["does"], told["folder"], told["family"]) == (["embedder"], None, None)


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if chromium.PROGRAM is None:
        pytest.skip("no Chromium on this machine; apt install chromium")
    with chromium.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def fill(tab: Tab, **values: Any) -> None:
    for id, value in values.items():
        tab.run(f"document.getElementById({id.replace('_', '-')!r}).value = {value!r}")


def submit(tab: Tab, form: str) -> None:
    tab.run(f"document.getElementById({form!r}).requestSubmit()")


def test_a_key_opens_it_and_a_chat_is_the_offline_answer(tab: Tab, address: str, tiny_folder: Path) -> None:
    tab.open(f"{address}/")
    tab.until("document.getElementById('key-form').hidden === false")
    assert "API key" in tab.text("#trouble")
    assert tab.text("#talk") == ""  # not before the key
    fill(tab, key="secret")
    submit(tab, "key-form")
    tab.until("document.getElementById('talk').hidden === false")
    assert tab.text("#model") == NAME and tab.run("document.images.length") == 0
    assert tab.text("#trouble") == "" and tab.text("#key-form") == ""
    fill(tab, say="hello there", max_tokens=9, temperature=0)
    submit(tab, "talk-form")
    tab.until("document.querySelectorAll('#log .quiet').length === 1")
    llm = LLM(tiny_folder, device="cpu", num_blocks=100)
    tokens = llm.tokenizer.chat([{"role": "user", "content": "hello there"}])
    (want,) = llm.generate([tokens], SamplingParams(max_tokens=9, temperature=0))
    assert tab.run("document.querySelector('#log .assistant').textContent") == want.text
    assert f"{len(want.token_ids)} tokens, the first after" in tab.text("#log .quiet")
    assert tab.run("messages.length") == 2
    tab.run("document.getElementById('plain').checked = true")
    fill(tab, say="once", max_tokens=5)
    submit(tab, "talk-form")
    tab.until("document.querySelectorAll('#log .quiet').length === 2")
    (want,) = llm.generate("once", SamplingParams(max_tokens=5, temperature=0))
    assert tab.run("[...document.querySelectorAll('#log .assistant')].at(-1).textContent") == want.text
    assert all("401" in complaint for complaint in tab.complaints), tab.complaints


def opened(tab: Tab, address: str, **screen: Any) -> None:
    """The page with its key, and at least two looks at the metrics."""
    tab.open(f"{address}/")
    tab.run("sessionStorage.setItem('pared-key', 'secret')")
    tab.complaints.clear()
    tab.open(f"{address}/?again", **screen)
    tab.until("document.getElementById('talk').hidden === false && samples.length > 1")


def test_it_shows_what_metrics_and_the_folder_say(tab: Tab, address: str, tiny_folder: Path) -> None:
    asked = {"prompt": "some words", "max_tokens": 8, "ignore_eos": True}
    httpx.post(f"{address}/v1/completions", json=asked, headers={"Authorization": "Bearer secret"}, timeout=60)
    opened(tab, address)
    told = httpx.get(f"{address}/metrics").text
    answered = sum(float(n) for n in re.findall(r"^pared:request_success_total\{.*\} (\S+)$", told, re.MULTILINE))
    assert [line for line in tab.text("#tile-requests").split("\n") if line][1:] == [
        "0 running",
        f"0 waiting, {answered:g} answered",
    ]
    assert tab.text("#state") == "ready" and tab.text("#kv").endswith("%")
    with open_folder(tiny_folder) as folder:
        report = folder_report(folder)
    assert len(tab.run("[...document.querySelectorAll('#kinds tr')].map(r => r.innerText)")) == 2 + len(report.kinds)
    assert "48x32" in tab.text("#kinds") and "mlp.up_proj" in tab.text("#kinds")
    assert "tokens/s" in tab.text("#measured") and report.provenance["source"]["name"] in tab.text("#made")
    assert tab.run("document.querySelectorAll('#latency tr').length") == 5 and " ms" in tab.text("#latency")
    assert tab.text("#fallbacks") == "" and tab.complaints == []


def test_quantiles_are_prometheus_own(tab: Tab, address: str) -> None:
    opened(tab, address)
    buckets = "[[0.1, 0], [0.2, 4], [0.4, 8], [Infinity, 10]]"
    for share, want in ((0.4, 0.2), (0.2, 0.15), (0.6, 0.3), (0.99, 0.4)):
        assert tab.run(f"quantile({share}, {buckets})") == pytest.approx(want)
    assert tab.run("quantile(0.5, [[0.1, 0], [Infinity, 0]])") is None
    assert tab.run("quantile(0.5, since([[1, 7], [2, 9], [Infinity, 9]], [[1, 7], [2, 7], [Infinity, 7]]))") == 1.5


def test_errors_are_shown_and_the_text_is_kept(tab: Tab, address: str) -> None:
    opened(tab, address)
    fill(tab, say="x" * 400, max_tokens=5)
    submit(tab, "talk-form")
    tab.until("document.getElementById('trouble').hidden === false")
    assert "256" in tab.text("#trouble")
    assert tab.run("document.getElementById('say').value.length") == 400
    assert tab.run("document.getElementById('send').disabled") is False


def test_it_shows_what_routers_let_sleep(tab: Tab, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = routed.serving_folder(tiny_checkpoint, tmp_path)
    llm = LLM(folder, device="cpu", num_blocks=100)
    with serving(service_of(llm, "routed", Limits())) as address:
        tab.open(f"{address}/")
        tab.until("samples.length > 1")
        assert "asleep" in tab.text("#tile-ffns") and " by layer" in tab.text("#asleep-layers")
        httpx.post(f"{address}/v1/completions", json={"prompt": "some words", "ignore_eos": True}, timeout=60)
        uses = llm.core.ffn_use()
        tab.until(f"samples.at(-1).values.ffn_groups_total === {sum(use.groups * use.rows for use in uses)}")
        assert tab.run("asleep(samples.at(-1)).each") == pytest.approx([use.sparsity for use in uses])
        recent = tab.run("asleep(samples.at(-1), samples[0])")
        assert tab.text("#asleep").startswith(f"{100 * recent['all']:.0f}")


ENDLESS = """
const asking = fetch;
const endless = (body) => body.replace("{", '{"ignore_eos": true, ');
window.fetch = (path, options) => asking(path, options?.body ? { ...options, body: endless(options.body) } : options);
"""
STOP_AT_ONCE = """
new Promise((done) => {
  const said = () => document.querySelector("#log .assistant")?.textContent;
  const look = () => (said() ? done($("stop").click()) : setTimeout(look));
  look();
})
"""


def test_an_answer_can_be_stopped(tab: Tab, address: str) -> None:
    opened(tab, address)
    tab.run(ENDLESS)
    fill(tab, say="tell", max_tokens=230)
    submit(tab, "talk-form")
    tab.run(STOP_AT_ONCE)
    tab.until("stopping === null")
    assert tab.text("#trouble") == "" and tab.run("document.querySelectorAll('#log .quiet').length") == 0
    assert tab.run("messages.length") == 2  # what there is of it belongs to the conversation


@pytest.mark.parametrize(
    "screen", [{"width": 360, "height": 740}, {"width": 1400, "dark": True}], ids=["phone", "dark"]
)
def test_it_fits_its_screen(tab: Tab, address: str, screen: dict, tmp_path: Path) -> None:
    opened(tab, address, **screen)
    assert tab.run("document.documentElement.scrollWidth") <= screen["width"]
    light = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light is not screen.get("dark", False)
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_an_encoder_compares_texts(tab: Tab) -> None:
    service = Service("lengths", Metrics(), embedder=AsyncEmbedder(Counting()))
    with serving(service) as address:
        tab.open(f"{address}/")
        tab.until("document.getElementById('vectors').hidden === false && samples.length > 0")
        assert tab.text("#talk") == tab.text("#tile-output") == ""
        fill(tab, texts="one\ntwo longer")
        submit(tab, "vectors-form")
        tab.until("document.querySelectorAll('#alike tr').length === 3")
        assert tab.text("#alike tr:nth-child(2)").split("\t")[1] == "1.000"
