"""Text stays text, whatever it is; and the page of a run that has little more than metrics."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from markup import Page, checked, outside_references

from tools.report import main
from vitscale.report.page.build import write_page
from vitscale.report.page.html import Html, element, escaped, table
from vitscale.report.page.records import read_columns, read_records, short_names
from vitscale.report.runs import render

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; <!-- ]]> </style></script>",
    "\x00\x1b[31m\ud800\ufffe\u202egnp",
]


def report(*arguments: object) -> int:
    return main(list(map(str, arguments)))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_elements_and_attributes(text: str) -> None:
    content = element("p", text, title=text) + table([text, "b"], [[text, text]], caption=text)
    parsed = Page(content)
    assert {tag for tag, _ in parsed.tags} == set(
        ["p", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"]
    )
    assert outside_references(parsed, content) == []
    shown = re.sub("[\x00-\x1f\u202e\ud800\ufffe]", "\ufffd", text)
    assert parsed.texts == [shown] * 6 or parsed.texts == [shown] * 3 + ["b"] + [shown] * 2
    assert parsed.values("title") == [shown]
    content.encode()  # no lone surrogate is left


def test_markup_stays_markup_and_secrets_of_urls_are_left_out() -> None:
    assert escaped(Html("<b>")) == "<b>" and escaped("<b>") == "&lt;b&gt;"
    assert escaped("https://me:word@host/a?sig=1 b") == "https://host/a?*** b"


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["runs/a/pretrain", "runs/a/finetune"]) == ["pretrain", "finetune"]
    assert short_names(["x/a/run", "x/b/run"]) == ["a/run", "b/run"]
    assert short_names(["runs/a"]) == ["a"]


def test_what_is_no_number_is_not_drawn(tmp_path: Path) -> None:
    rows = [{"step": 2, "a": 1.5, "b": "<b>"}, {"step": 1, "a": 2, "c": True}, {"step": 3, "a": 10**400}]
    (tmp_path / "m").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "a": 9')
    columns = read_columns(tmp_path / "m")
    assert list(columns) == ["a"]
    assert columns["a"].steps.tolist() == [1, 2] and columns["a"].values.tolist() == [2.0, 1.5]


def test_a_run_of_an_earlier_version_has_a_page_without_what_it_did_not_write(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder" / "page.html"
    assert report(run, "--out", out) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    page = checked(out.read_text())
    assert "unknown how it ended is not written" in page.text
    assert "config.toml does not exist: a run writes it after its first evaluation" in page.text
    assert "There is no history.jsonl" in page.text and "No sample had to be replaced" in page.text
    assert page.text.count("verified") == 3 and "cifar10/top1 25% 50% at step 20 50% at step 20" in page.text
    assert "_std" not in page.text and "probe" not in page.text  # what was chosen is no score
    assert page.count("img") == 0 and len(page.values("data-label")) == 3
    assert not list(out.parent.glob(".*"))  # nothing temporary is left


def test_of_a_loss_the_lowest_is_best_and_none_is_a_percentage(run: Path, tmp_path: Path) -> None:
    losses = {0: 2.302, 10: 1.5, 20: 1.9}
    rows = [{"step": step, "eval/val/loss": loss, "eval/val/top1": 1 / loss} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report(run, "--out", tmp_path / "page.html") == 0
    page = checked((tmp_path / "page.html").read_text())
    assert "val/loss 2.302 1.5 at step 10 1.9 at step 20" in page.text
    assert "val/top1 43.44% 66.67% at step 10 52.63% at step 20" in page.text
    assert "1.9 val/loss" in page.text and "20 1.9 52.63%" in page.text
    assert "val/loss. run: 2.302 at step 0, 1.9 at step 20" in page.text


def test_a_run_begun_from_another_has_lines_for_its_later_starts_alone(run: Path, tmp_path: Path) -> None:
    starts = [{"step": step, "versions": {}} for step in (9, 20)]
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    assert report(run, "--out", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert "start 2, from step 20" in text and "start 1, from step" not in text


def test_a_loss_that_stands_out_lists_the_first_of_its_samples(run: Path, tmp_path: Path) -> None:
    for number, end in ((32, "place 31"), (33, "place 31\n1 more in spikes.jsonl")):
        spike = {"step": 3, "loss": 9.0, "samples": [f"place {n}" for n in range(number)]}
        (run / "spikes.jsonl").write_text(json.dumps(spike) + "\n")
        assert report(run, "--out", tmp_path / "page.html") == 0
        text = (tmp_path / "page.html").read_text()
        assert f"{number} samples" in text and f"place 30\n{end}</pre>" in text


def test_a_roll_back_is_told_with_what_was_passed_over(run: Path, tmp_path: Path) -> None:
    first = {"step": 0, "data_step": 0, "rollbacks": 0, "world_size": 2, "versions": {"torch": "2.11"}}
    again = {**first, "step": 20, "data_step": 32, "rollbacks": 1, "changed": {"optim.lr": [1, "<b>"]}}
    (run / "history.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(again)}\n{{torn")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "train/skipped_steps": 0}\n{"step": 9, "train/skipped_steps": 3}\n'
    )
    assert report(run, "--out", tmp_path / "page.html") == 0
    page = checked((tmp_path / "page.html").read_text())
    assert (
        "rolled back to step 20; 12 batches are passed over in all; optim.lr = '<b>' (before: 1)" in page.text
    )
    assert page.text.count("torch 2.11") == 1  # at the first start, and not again
    assert (
        "3 steps skipped" in page.text and "Skipped steps, so far. run: 0 at step 1, 3 at step 9" in page.text
    )


def test_a_run_that_failed_before_its_first_row_says_why(tmp_path: Path) -> None:
    status = {"state": "failed", "step": 0, "total_steps": 9, "reason": "data.index <b>x</b> is missing"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert report(tmp_path, "--out", tmp_path / "page.html") == 0
    page = checked((tmp_path / "page.html").read_text())
    assert "failed data.index <b>x</b> is missing" in page.text and "0 of 9 steps" in page.text


def test_a_damaged_run_directory_has_a_page_all_the_same(run: Path, tmp_path: Path) -> None:
    (run / "config.toml").write_text("run_dir = [[[")
    (run / "time.json").write_text("{")
    (run / "status.json").write_text("[]")
    (run / "history.jsonl").write_text('{"step": 3, "changed": 7, "versions": [1]}\n{"step": "x"}\n')
    (run / "quarantine.jsonl").write_text('{"step": 3, "sample": 5}\n{"step": 4}\n')
    (run / "spikes.jsonl").write_text(
        '{"step": 3, "loss": "nan", "samples": 5}\n{"step": 4, "deviation": "x"}\n'
    )
    assert report(run, "--out", tmp_path / "page.html") == 0
    page = checked((tmp_path / "page.html").read_text())
    assert "2 different samples were replaced, 2 times in all" in page.text
    assert "2 losses stand out" in page.text and "config.toml cannot be read by this vitscale" in page.text


def test_a_sample_that_every_epoch_replaces_is_kept_once(tmp_path: Path) -> None:
    rows = [{"step": step, "sample": f"shard {step % 2}: {'x' * 1000}"} for step in range(1, 1001)]
    (tmp_path / "status.json").write_text('{"state": "running", "step": 0, "total_steps": 9}')
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    (record,) = read_records([str(tmp_path)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [tuple(sample) for sample in record.quarantine.values()] == [(500, 1, 999), (500, 2, 1000)]
    assert peak < 500_000  # the rows take more than 1 MB


START = '{"starts": [{"began": 7.0, "seconds": {}, "marks": [{"step": 0, "elapsed": 0, "seconds": {}}]}]}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("time.json", START),
        *((f"{name}.json", "[" * 20_000) for name in ("status", "time")),
        *((f"{name}.jsonl", "[" * 20_000 + "\n") for name in ("metrics", "history", "quarantine", "spikes")),
        ("config.toml", f"run_dir = {'[' * 20_000}"),
        ("metrics.jsonl", f'{{"step": {"9" * 400}, "train/loss": 1.0}}\n'),
        ("time.json", START.replace("7.0", "1e300")),
        ("time.json", START.replace("7.0", '"x"')),
        ("time.json", START.replace("{}", "7")),
        ("time.json", '{"starts": [{"began": 1, "marks": []}, {"began": 2, "marks": []}]}'),
    ],
)
def test_no_content_of_a_file_keeps_a_run_from_its_page(
    run: Path, tmp_path: Path, name: str, text: str
) -> None:
    (run / name).write_text(text)
    assert report(run, "--out", tmp_path / "page.html") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], r"metrics.jsonl does not exist: .* is not a run directory, or has logged nothing yet"),
        (["{}/absent"], "is not a run directory"),
        (
            ["s3://bucket/run"],
            "s3://bucket/run is a store, which holds a run's checkpoints and not its metrics",
        ),
        (["{}/run", "{}/absent"], "absent is not a run directory"),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "page.html"
    assert report(*(argument.format(tmp_path) for argument in arguments), "--out", out) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not out.exists()


def test_a_page_of_one_run_takes_its_name_alone(run: Path, tmp_path: Path) -> None:
    assert write_page(str(run), str(tmp_path / "page.html"), with_images=False)
    assert checked((tmp_path / "page.html").read_text()).text.startswith("run")


def test_a_folder_is_no_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(run, "--out", tmp_path) == 2
    assert "is a folder; name a file in it, like" in capsys.readouterr().err


def test_a_band_that_was_removed_is_not_on_the_page(run: Path, tmp_path: Path) -> None:
    config = (
        'run_dir = "a"\nglobal_batch = 8\ntotal_steps = 20\nmodel = {variant = "Ti/16", num_classes = 5}\n'
    )
    config += 'data = {index = "a.json"}\n[expect]\nsource = "before"\n[expect.bands]\n"train/loss" = BAND\n'
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    for band, told in (("[[1, 2.0, 3.0]]", True), ("[]", False)):
        (run / "config.toml").write_text(config.replace("BAND", band))
        assert report(run, "--out", tmp_path / "page.html", "--no-images") == 0
        text = checked((tmp_path / "page.html").read_text()).text
        assert ("Source of the bands: before" in text) == ("Shaded: what the config" in text) == told


def test_a_page_replaces_nothing_that_is_no_page(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert report(run, "--out", tmp_path / "README.md") == 2
    assert "README.md does not end in .html; name a file that does" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_without_a_page_the_table_is_printed_as_before(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            'ss": 1}\n{"step": 40, "train/loss": null, "eval/x/top1": "<b>", "goodput/step": "most"}\n'
        )
    assert report(run) == 0
    shown = capsys.readouterr().out
    assert "train/loss                       2.5000     9.0000   10 to 31" in shown
    assert "eval/x/top1" not in shown and "_std" not in shown and "probe" not in shown
    with pytest.raises(SystemExit):
        report(run, "--no-images")


def test_the_table_has_the_ends_of_a_long_log_without_holding_it(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": 1 / step, "goodput/step": 0.5} for step in range(2, 10_000)]
    rows += [{"step": 10_000, "eval/x/top1": value} for value in (0.25, 0.5)]
    rows += [{"step": 30, "eval/x/top1": 0.125}, {"step": 1, "train/loss": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    table = render([str(tmp_path)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _, loss, top1, _ = (line.split()[1:] for line in table.splitlines())
    assert loss == ["train/loss", "9.0000", "0.0001", "1", "to", "9999"]
    assert top1 == ["eval/x/top1", "0.1250", "0.5000", "30", "to", "10000"]
    assert peak < 300_000  # the numbers take more than twice as much


@pytest.mark.parametrize(("text", "passed_over"), [("", False), ('{"step": 1', False), ("[]\nhello\n", True)])
def test_a_run_without_a_row_has_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog, text: str, passed_over: bool
) -> None:
    """A last line that is torn is no fault: the run writes it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert report(tmp_path) == 2
    shown = capsys.readouterr()
    said = f"error: {path} holds no row of numbers: {tmp_path} has logged nothing yet\n"
    assert shown.err.endswith(said) and not shown.out
    warned = [f"{path}: lines that are not rows, skipped: 2"]
    assert caplog.messages == (warned if passed_over else [])
