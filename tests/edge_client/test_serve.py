"""The local web page: drop photos, see tags and heat maps; closed to everyone else."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmpt.edge_client.serve import MAXIMUM_UPLOAD, ServeError, examine, open_server
from fedmpt.edge_client.tagger import Tagger

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def tagger(colour_tagger: Path) -> Tagger:
    return Tagger.load(colour_tagger, "cpu", threads=1)


@pytest.fixture(scope="module")
def port(tagger: Tagger) -> Iterator[int]:
    with serving(tagger, "127.0.0.1") as port:
        yield port


@contextlib.contextmanager
def serving(tagger: Tagger, host: str) -> Iterator[int]:
    with open_server(tagger, host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def request(
    port: int, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def half_green() -> Image.Image:
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, 40:, 1] = 255
    pixels[:, :40] = (90, 70, 60)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def test_a_photo_comes_back_with_tags_and_heat_maps(port: int) -> None:
    status, body, _ = request(port, "POST", "/tag", encoded(half_green()))
    result = json.loads(body)
    assert status == 200
    assert [(tag["label"], tag["found"]) for tag in result["tags"]] == [
        ("green", True),
        ("red", False),
        ("blue", False),
    ]
    assert result["photo"].startswith("data:image/jpeg;base64,")
    assert all(tag["heatmap"].startswith("data:image/png;base64,") for tag in result["tags"])


def test_what_is_shown_is_what_tag_says(tagger: Tagger) -> None:
    shown = examine(tagger, encoded(half_green()), "photo")["tags"]
    assert [(tag["label"], tag["probability"]) for tag in shown if tag["found"]] == tagger.tag(half_green())


def test_what_was_found_stands_before_more_probable_labels_that_were_not(tagger: Tagger) -> None:
    tags = examine(tagger, encoded(Image.new("RGB", (40, 40), (120, 110, 70))), "photo")["tags"]
    assert [(tag["label"], tag["found"]) for tag in tags] == [
        ("blue", True),
        ("red", False),
        ("green", False),
    ]


def test_something_else_than_a_photo_is_refused_with_the_reason(port: int) -> None:
    for body in (b"no photo", b"", encoded(half_green())[:80]):
        status, answer, _ = request(port, "POST", "/tag", body)
        assert status == 422
        assert json.loads(answer)["error"]


@pytest.mark.parametrize(
    "length",
    [str(MAXIMUM_UPLOAD + 1), "0" * 20 + "3221225472", "0" * 5000 + str(MAXIMUM_UPLOAD + 1), "9" * 5000],
)
def test_uploads_are_bounded_before_they_are_read(port: int, length: str) -> None:
    status, body, _ = request(port, "POST", "/tag", None, Content_Length=length)
    assert (status, json.loads(body)) == (413, {"error": "larger than 64 MB"})


def test_zeros_before_a_length_mean_nothing(port: int) -> None:
    photo = encoded(half_green())
    status, body, _ = request(port, "POST", "/tag", photo, Content_Length="0" * 30 + str(len(photo)))
    assert status == 200
    assert json.loads(body)["tags"]


def raw(port: int, text: str) -> bytes:
    """What comes back for these bytes until the server closes the connection or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(text.encode())
        answer = b""
        with contextlib.suppress(TimeoutError):
            while part := connection.recv(65536):
                answer += part
        return answer


@pytest.mark.parametrize(
    "told",
    ["Content-Length: 3\r\nContent-Length: 3", "Content-Length: 3\r\nTransfer-Encoding: chunked", "X: 1"],
)
def test_a_length_that_is_not_told_plainly_is_refused(port: int, told: str) -> None:
    answer = raw(port, f"POST /tag HTTP/1.1\r\nHost: 127.0.0.1\r\n{told}\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 411 ")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "told", ["Content-Length: 40", "Transfer-Encoding: chunked", "Content-Length : 40", "Host: evil"]
)
def test_the_body_of_a_get_is_no_second_request(port: int, told: str) -> None:
    second = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    answer = raw(port, f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{told}\r\n\r\n{second}")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("length", ["-1", "1e3", "٣", "9" * 5000])
def test_a_nonsensical_length_is_refused(port: int, length: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(
            f"POST /tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        assert connection.recv(100).split()[1] in (b"411", b"413")


def test_a_length_is_required(port: int) -> None:
    status, _, _ = request(port, "POST", "/tag", iter([b"chunk"]), Transfer_Encoding="chunked")
    assert status == 411


def test_other_paths_do_not_exist(port: int) -> None:
    assert request(port, "GET", "/../etc/passwd")[0] == 404
    assert request(port, "POST", "/")[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_names_for_this_machine_are_refused(port: int, host: str) -> None:
    assert request(port, "GET", "/", Host=host)[0] == 403
    assert request(port, "POST", "/tag", encoded(half_green()), Host=host)[0] == 403


def test_photos_sent_by_other_web_sites_are_refused(port: int) -> None:
    photo = encoded(half_green())
    assert request(port, "POST", "/tag", photo, Origin="http://evil.example")[0] == 403
    assert request(port, "POST", "/tag", photo, Origin="null")[0] == 403
    assert request(port, "POST", "/tag", photo, Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_the_page_loads_nothing_from_elsewhere(port: int) -> None:
    status, body, headers = request(port, "GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    page = body.decode()
    assert "http:" not in page
    assert "https:" not in page
    assert "{{" not in page


def test_the_page_promises_that_photos_stay_only_where_they_do(tagger: Tagger, port: int) -> None:
    assert b"They stay on this machine." in request(port, "GET", "/")[1]
    with serving(tagger, "0.0.0.0") as open_port:
        page = request(open_port, "GET", "/")[1]
    assert b"They go, unencrypted, to the machine that serves this page" in page
    assert b"They stay on this machine" not in page


def test_it_listens_on_this_machine_alone(tagger: Tagger) -> None:
    with open_server(tagger) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_named(tagger: Tagger, port: int) -> None:
    with pytest.raises(ServeError, match=rf"127\.0\.0\.1:{port} .*choose another --port"):
        open_server(tagger, port=port)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    arguments = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900")
    for argument in (*arguments, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_in_a_browser(browser: Any, port: int, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    photo, broken = tmp_path / "meadow <b>.png", tmp_path / "broken.jpg"
    half_green().save(photo)
    broken.write_text("no photo")
    browser.get(f"http://127.0.0.1:{port}/")
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(f"{broken}\n{photo}")
    WebDriverWait(browser, 30).until(lambda page: page.find_elements(By.CSS_SELECTOR, "article button"))
    WebDriverWait(browser, 30).until(lambda page: page.find_elements(By.CSS_SELECTOR, "article.failed"))
    assert [title.text for title in browser.find_elements(By.TAG_NAME, "h2")] == [
        "broken.jpg",
        "meadow <b>.png",
    ]
    tags = browser.find_elements(By.CSS_SELECTOR, "article button")
    assert [tag.text.split() for tag in tags] == [["green", "63.7%"], ["red", "17.7%"], ["blue", "11.8%"]]
    assert "not an image" in browser.find_element(By.CSS_SELECTOR, "article.failed p").text

    before = picture(browser)
    np.testing.assert_allclose(before[:, -20], [[0, 255, 0]] * len(before), atol=8)
    ActionChains(browser).move_to_element(tags[0]).pause(0.5).perform()
    after = picture(browser)
    assert after[:, -20, 0].min() > 100  # heat over the green half
    np.testing.assert_allclose(after[:, 20], before[:, 20], atol=8)  # and none over the other
    assert [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "422" not in entry["message"]
    ] == []


def test_dropping_a_photo_tags_it(browser: Any, port: int) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"http://127.0.0.1:{port}/")
    drop(browser, encoded(half_green()), "dropped.png", "image/png")
    WebDriverWait(browser, 30).until(lambda page: page.find_elements(By.CSS_SELECTOR, "article button"))
    assert browser.find_element(By.TAG_NAME, "h2").text == "dropped.png"


def test_what_is_dropped_and_is_no_photo_says_so(browser: Any, port: int) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"http://127.0.0.1:{port}/")
    drop(browser, b"no photo", "letter.pdf", "application/pdf")
    WebDriverWait(browser, 30).until(lambda page: page.find_elements(By.CSS_SELECTOR, "article.failed"))
    assert browser.find_element(By.TAG_NAME, "h2").text == "letter.pdf"
    assert browser.find_element(By.CSS_SELECTOR, "article.failed p").text == "not a photo (application/pdf)"


def drop(browser: Any, content: bytes, name: str, kind: str) -> None:
    """Drop a file on the page."""
    browser.execute_script(
        """
        const file = new File([new Uint8Array(arguments[0])], arguments[1], {type: arguments[2]});
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(file);
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
        """,
        list(content),
        name,
        kind,
    )


def picture(browser: Any) -> np.ndarray:
    """What the browser shows of the first photo, as an array of ints."""
    from selenium.webdriver.common.by import By

    shot = browser.find_element(By.CSS_SELECTOR, "article:not(.failed) .picture").screenshot_as_png
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
