"""`marlhf report` from the command line."""

import json

import pytest

from marlhf_mega.cli import main
from marlhf_mega.report.page import report


@pytest.fixture
def runs(tmp_path):
    folders = [tmp_path / "runs" / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
        lines = [{"step": step, "policy/kl": float(step)} for step in range(3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folders


def test_the_page_of_one_run_is_made_again_where_it_was(runs, capsys):
    report([runs[0]], runs[0] / "report.html")
    first = (runs[0] / "report.html").read_bytes()
    (runs[0] / "report.html").unlink()
    assert main(["report", str(runs[0])]) == 0
    assert (runs[0] / "report.html").read_bytes() == first
    assert capsys.readouterr().out == f"report: {runs[0] / 'report.html'}\n"


def test_the_page_of_several_runs_is_in_the_folder_that_holds_them(runs, tmp_path, capsys):
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'runs' / 'report.html'}\n"
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()


def test_what_is_no_run_is_refused_with_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: must be a run directory; it has no metrics.jsonl. Give run.dir of a run.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_refused_with_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'file'}: cannot be used; ")
