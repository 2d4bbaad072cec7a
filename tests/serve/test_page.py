"""The page in a real browser: Chromium, headless, driven by selenium; skipped where there is none."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import model_of, serving, tokenizer_of

from hybrid.sampling.display.pieces import visible

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="there is no Chromium with its driver")
ALL = ("ar", "block", "diffusion", "speculative")

CONTRAST = """
const ratio = (a, b) => {
  const [x, y] = [a, b].map(color => color.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
    .map(([r, g, b]) => .2126 * r + .7152 * g + .0722 * b);
  return (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
};
const box = document.createElement("div"), found = [];
box.className = "canvas";
document.body.append(box);
for (const kind of ["final", "draft"]) for (let h = 0; h < 360; h += 15) {
  const span = document.createElement("span");
  span.className = `token ${kind}`;
  span.style.setProperty("--h", h);
  box.append(span);
  const style = getComputedStyle(span);
  found.push(ratio(style.color, style.backgroundColor));
}
const body = getComputedStyle(document.body);
found.push(ratio(body.color, body.backgroundColor));
for (const soft of document.querySelectorAll(".soft, dt, button:enabled")) {
  let under = soft;
  while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") under = under.parentElement;
  found.push(ratio(getComputedStyle(soft).color, getComputedStyle(under).backgroundColor));
}
box.remove();
return found;
"""


class Browser:
    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def until(self, condition: Callable[[], Any], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.one("body").text
            time.sleep(0.05)

    def says(self, text: str) -> None:
        self.until(lambda: text in self.one("#status").text)

    def open(self, port: int) -> None:
        self.driver.get(f"http://127.0.0.1:{port}/")
        self.until(lambda: "tiny" in self.one("#model").text)

    def write(self, text: str) -> None:
        self.one("#prompt").clear()
        self.one("#prompt").send_keys(text)

    def shown(self, way: str) -> list[str]:
        """The text of each sample, of final tokens."""
        canvases = self.all(f"[data-way={way}] .canvas")
        script = "return [...arguments[0].querySelectorAll('.final, .given')].map(x => x.textContent).join('')"
        return [self.driver.execute_script(script, canvas) for canvas in canvases]

    @property
    def errors(self) -> list[str]:
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    folder = tmp_path_factory.mktemp("chrome")
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1300,1000"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def test_all_modes_come_side_by_side_and_survive_a_restart(browser: Browser) -> None:
    def decode_all() -> None:
        browser.one("#run").click()
        browser.says("Done.")
        for way in ALL:
            own = {"mode": way, "return_token_ids": True}
            choice = place.complete("one two", max_tokens=24, hybrid=own)["choices"][0]
            [text] = browser.shown(way)
            assert text == visible(choice["text"]), way
            figures = browser.all(f"[data-way={way}] dd")
            assert all(any(c.isdigit() for c in figure.text) for figure in figures[:1]), way
            assert int(browser.one(f"[data-way={way}] [data-figure=tokens]").text) == len(choice["token_ids"])
        assert not browser.all(".draft:not([data-sample])") and not browser.all(".samples .hidden")

    with serving(model_of(), tokenizer_of()) as place:
        port = place.port
        browser.open(port)
        browser.write("one two")
        browser.one("#max").clear()
        browser.one("#max").send_keys("24")
        decode_all()
        assert browser.errors == []
    browser.one("#run").click()
    browser.says("tries again")
    assert "lost" in browser.one("[data-way=ar] .error").text
    with serving(model_of(), tokenizer_of(), port=port) as place:
        browser.says("The server is back.")
        browser.driver.get_log("browser")  # that nobody answered is no fault of the page
        decode_all()
        assert browser.errors == []


def test_samples_chat_gaps_and_what_goes_wrong(browser: Browser) -> None:
    with serving(model_of(), tokenizer_of()) as place:
        browser.open(place.port)
        browser.write("one two")
        for name, value in (("#samples", "2"), ("#temperature", "1"), ("#max", "8"), ("#seed", "3")):
            browser.one(name).clear()
            browser.one(name).send_keys(value)
        browser.one("#run").click()
        browser.says("Done.")
        found = place.complete("one two", n=2, temperature=1, top_p=1, max_tokens=8, seed=3, hybrid={"mode": "ar"})
        assert browser.shown("ar") == [visible(choice["text"]) for choice in found["choices"]]

        browser.one("[value=chat]").click()
        browser.write("add <|mask|>")
        browser.one("#run").click()
        browser.says("Done.")
        browser.one("[data-way=block] .keep").click()
        assert [item.text.split(":")[0] for item in browser.all("#talk li")] == ["You", "Model"]
        browser.write("and")
        browser.one("#run").click()
        browser.says("Done.")

        browser.one("[value=gaps]").click()
        browser.write("def add")
        browser.driver.execute_script("document.getElementById('prompt').setSelectionRange(2, 5)")
        browser.one("#gap-size").send_keys("3")
        browser.one("#gap").click()
        assert browser.one("#prompt").get_attribute("value") == "de<mask:3>dd"
        browser.one("#run").click()
        browser.says("Done.")
        for way, rule in (("infill", "threshold"), ("leftmost", "leftmost")):
            own = {"mode": "infill", "reveal": rule}
            fields = {"n": 2, "temperature": 1, "top_p": 1, "seed": 3, "hybrid": own}
            choices = place.complete("de<mask:3>dd", **fields)["choices"]
            assert browser.shown(way) == [visible(choice["text"]) for choice in choices]

        assert browser.errors == []
        browser.write("no gap")
        browser.one("#run").click()
        browser.until(lambda: "no gap to fill" in browser.one("[data-way=infill] .error").text)


def test_keys_and_readers_are_enough(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    with serving(model_of(), tokenizer_of(), api_key="secret") as place:
        browser.driver.get(f"http://127.0.0.1:{place.port}/")
        browser.says("asks for its key")
        browser.one("#key").send_keys("secret" + Keys.TAB)
        browser.until(lambda: "tiny" in browser.one("#model").text)
        browser.driver.get_log("browser")  # the answer 401
        browser.one("#prompt").send_keys("one" + Keys.CONTROL + Keys.ENTER)
        browser.says("Done.")
        assert all(browser.shown(way)[0] for way in ALL)
        unnamed = "return [...document.querySelectorAll('input, select, textarea')].filter(x => !x.labels[0]).length"
        assert browser.driver.execute_script(unnamed) == 0
        assert browser.one("html").get_attribute("lang") == "en"
        for section in browser.all("#lanes section"):
            assert section.aria_role == "region" and section.accessible_name
        assert all(canvas.get_attribute("aria-busy") == "false" for canvas in browser.all(".canvas"))
        reached = set()
        browser.one("body").click()
        browser.driver.execute_script("document.activeElement.blur()")
        for _ in range(40):
            browser.driver.switch_to.active_element.send_keys(Keys.TAB)
            reached.add(browser.driver.switch_to.active_element.get_attribute("id"))
        assert {"prompt", "max", "samples", "temperature", "rule", "window", "fused", "key", "run"} <= reached
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            assert min(browser.driver.execute_script(CONTRAST)) >= 4.5, scheme
        browser.driver.execute_script("sessionStorage.clear()")
        assert browser.errors == []


def test_nothing_comes_from_elsewhere() -> None:
    page = Path(__file__).parents[2] / "sampling" / "serve" / "page"
    for file in page.iterdir():
        assert not re.search(r"""(src|href|url|import|fetch)\s*[=(]?\s*["'`]?(https?:)?//""", file.read_text()), file
