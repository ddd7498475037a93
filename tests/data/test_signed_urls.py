"""Signed URLs: they are read with, and are nowhere written or printed."""

import dataclasses
import logging
import threading
from pathlib import Path

import pytest
from data.epochs import assert_same_epoch, epoch, remote_index
from data.servers import QUERY, SECRET

from tools.data import main
from vitscale.data.index import Index, check_shards
from vitscale.data.indexing import build_index, open_index
from vitscale.data.reader import describe
from vitscale.errors import ConfigError, StoreError, UserError
from vitscale.redaction import redact
from vitscale.stores import attempts, storage

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def signed(web: str, folder: Path, tmp_path: Path, monkeypatch) -> list[str]:
    """The URLs of the shards with their signatures, which VITSCALE_URLS names, too."""
    names = sorted(path.name for path in (folder / "vit").glob("*.tar"))
    urls = [f"{web}/signed/{name}?{QUERY}" for name in names]
    (tmp_path / "urls.txt").write_text("\n".join(urls) + "\n")
    monkeypatch.setenv("VITSCALE_URLS", str(tmp_path / "urls.txt"))
    return urls


def test_an_index_of_signed_urls_holds_no_signature_and_is_read_with_them(
    signed: list[str], local: Index, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("VITSCALE_URLS")
    pattern = signed[0].replace("000000", "{000000..000002}")
    out = tmp_path / "index.json"
    assert main(["index", pattern, "--out", str(out), "--chunk-samples", "4", "--workers", "2"]) == 0
    assert "without their queries" in capsys.readouterr().err
    assert SECRET not in out.read_text()
    index = Index.load(str(out))
    assert [shard.url for shard in index.shards] == [url.partition("?")[0] for url in signed]
    assert index.fingerprint() == local.fingerprint()
    with pytest.raises(StoreError, match=r"access is denied .* VITSCALE_URLS"):
        check_shards(index)
    monkeypatch.setenv("VITSCALE_URLS", str(tmp_path / "urls.txt"))
    check_shards(index)
    assert_same_epoch(epoch(index, 2), epoch(local))
    assert main(["verify", str(out), "--workers", "0"]) == 0


def test_a_list_of_copies_holds_no_signature_nor_does_what_is_said_about_it(
    signed: list[str], folder: Path, tmp_path: Path, capsys, caplog, monkeypatch
) -> None:
    out, sheet = tmp_path / "copies.json", tmp_path / "copies.png"
    monkeypatch.delenv("VITSCALE_URLS")
    command = ["dedup", f"{folder}/vit/index.json", "--out", str(out), "--sheet", str(sheet)]
    command += ["--workers", "0"]
    assert main([*command, "--against", *signed]) == 0
    text = out.read_text()
    assert "/signed/" in text and SECRET not in text and QUERY not in text
    wrong = [url.replace("train-", "nothing-") for url in signed]
    for against in (wrong, [url.replace(SECRET, f"{SECRET}-old") for url in signed]):
        assert main([*command, "--against", *against]) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err, caplog.text):
        assert SECRET not in text, text
    assert "access is denied" in said.err and "nothing-" in said.err
    with pytest.raises(UserError, match=r"index\.json\?\*\*\* is"):
        open_index(f"{wrong[0].partition('/signed/')[0]}/nothing/index.json?{QUERY}")


def test_urls_are_found_by_their_path_on_any_host_and_renewed_in_a_run(
    signed: list[str], local: Index, tmp_path: Path
) -> None:
    index = remote_index(local, "s3://signed")  # a bucket of that name
    check_shards(index)
    index = remote_index(local, "https://elsewhere.example/signed")
    check_shards(index)
    (tmp_path / "urls.txt").write_text("\n".join(url.replace(SECRET, "expired") for url in signed))
    for scheme in ("s3://signed", "https://elsewhere.example/signed"):
        with pytest.raises(
            StoreError, match=r"access is denied .* refresh the URLs in .*urls\.txt"
        ) as denied:
            check_shards(remote_index(local, scheme))
        assert "AWS" not in str(denied.value) and "VITSCALE_URLS" in str(denied.value)
    (tmp_path / "urls.txt").write_text("\n".join(signed) + "\n\n")
    check_shards(index)


@pytest.mark.parametrize("kept", [False, True], ids=["empty", "half written"])
def test_a_read_while_the_file_of_urls_is_written_waits_for_it(
    signed: list[str], local: Index, tmp_path: Path, web: str, kept: bool
) -> None:
    index, path = remote_index(local, f"{web}/signed"), tmp_path / "urls.txt"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if kept else "")
    writing = threading.Timer(0.1, path.write_text, (whole,))
    writing.start()
    check_shards(index)
    writing.join()


def test_shards_that_only_their_queries_tell_apart_are_refused() -> None:
    urls = [f"http://127.0.0.1:1/get?file={number}" for number in range(2)]
    with pytest.raises(ConfigError, match="some shards differ only in the queries of their URLs"):
        build_index(urls)


def test_a_file_of_urls_that_is_missing_is_one_sentence(signed: list[str], monkeypatch) -> None:
    monkeypatch.setenv("VITSCALE_URLS", "nothing.txt")
    with pytest.raises(ConfigError, match=r"VITSCALE_URLS names nothing\.txt, which cannot be read"):
        storage.read_bytes(signed[0].partition("?")[0])


@pytest.mark.parametrize("place", ["secret", "nothing", "norange", "flaky503", "closed"])
def test_no_message_holds_a_secret(web: str, place: str, caplog, capsys, monkeypatch) -> None:
    monkeypatch.setattr(attempts, "ATTEMPTS", 4)
    caplog.set_level(logging.INFO)
    host = "127.0.0.1:9" if place == "closed" else web.removeprefix("http://")
    url = f"http://me:{SECRET}@{host}/{place}/index.json?{QUERY}"
    messages = []
    for _ in range(8 if place == "flaky503" else 1):
        for read in (
            lambda: storage.read_range(url, 0, 10),
            lambda: Index.load(url),
            lambda: build_index([url]),
        ):
            try:
                read()
            except (UserError, FileNotFoundError) as error:
                messages.append(str(error))
    main(["stats", url])
    messages += [capsys.readouterr().err, *(record.getMessage() for record in caplog.records)]
    assert place in "".join(messages)
    assert not any(SECRET in message for message in messages), messages


def test_a_quarantined_sample_of_an_old_index_with_queries_holds_none(web: str, local: Index) -> None:
    index = remote_index(local, f"{web}/secret")
    shards = tuple(dataclasses.replace(shard, url=f"{shard.url}?{QUERY}") for shard in index.shards)
    assert describe(dataclasses.replace(index, shards=shards), 3).startswith(
        f"{web}/secret/train-000000.tar?***, "
    )


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("reading https://h/a.tar?sig=x: failed", "reading https://h/a.tar?***: failed"),
        ("403, url='https://h/a?b=c,d'", "403, url='https://h/a?***'"),
        ("(https://u:p@w@h/a?b), HTTPS://u@h/?c.", "(https://h/a?***), HTTPS://h/?***"),
        ("why? data/a?b.tar s3://b/what?.tar", "why? data/a?b.tar s3://b/what?.tar"),
    ],
)
def test_urls_are_printed_without_users_and_queries(text: str, printed: str) -> None:
    assert redact(text).rstrip(".") == printed.rstrip(".")
