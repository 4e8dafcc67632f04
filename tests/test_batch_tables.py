"""Tables of jobs: the same rows from all kinds; what is no table, or goes too deep, is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.batch.tables import read_table
from tests.test_batch import ROWS, table

DEEP, DEEPER = "[" * 900 + "]" * 900, '{"a":' * 90_000 + "1" + "}" * 90_000


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_all_kinds_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert read_table(table(tmp_path / f"t.{kind}")) == [dict(row) for row in ROWS]


def test_whole_numbers_with_gaps_and_cells_of_text_become_what_a_job_has(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('prompt,steps,mask_invert,freeu,hires.scale\n"a, b",4,yes,"[1.5,1.6,0.9,0.2]",2\nc,,,,\n')
    expected = {"prompt": "a, b", "steps": 4, "mask_invert": True, "freeu": [1.5, 1.6, 0.9, 0.2], "hires.scale": 2.0}
    assert read_table(path) == [expected, {"prompt": "c"}]
    polars = pytest.importorskip("polars")
    path = tmp_path / "t.parquet"
    polars.DataFrame({"prompt": ["a", "b"], "steps": [4.0, None], "guidance": [3.0, 4.0]}).write_parquet(path)
    rows = read_table(path)
    assert rows == [{"prompt": "a", "steps": 4, "guidance": 3.0}, {"prompt": "b", "guidance": 4.0}]
    assert isinstance(rows[0]["steps"], int) and isinstance(rows[0]["guidance"], float)


@pytest.mark.parametrize("name, content, why", [
    ("t.txt", "a", ".parquet, .csv, .jsonl"), ("t.jsonl", "", "no row"), ("t.jsonl", '{"steps": 3}\n', "prompt"),
    ("t.jsonl", '{"prompt": "a"}\n{', "row=1: not JSON"), ("t.jsonl", '{"prompt": "a"}\n3\n', "row=1: '3'"),
    ("t.csv", "prompt,steps\na,4\nb,many\n", "row=1: steps='many': a number"),
    ("t.csv", "prompt,steps\na,4,5\n", "row=0: 2 cells"), ("t.csv", 'prompt\n"a', "not CSV"),
    ("t.csv", b"prompt\n\xff\n", "not UTF-8"), ("t.parquet", "PAR1", "not a Parquet file"),
    ("t.csv", "prompt,hires\na,3\n", "row=0: hires='3': an object"),
    ("t.csv", "prompt,mask_invert\na,maybe\n", "true or false"),
    ("t.csv", "prompt,steps,seed,steps\na,4,5,6\n", "two columns are named 'steps'"),
    ("t.csv", f"prompt,steps\na,4\nb,{'9' * 5000}\n", "row=1: steps='999"),
    ("t.csv", f'prompt,controls\na,"{DEEP}"\n', "row=0: controls: more than 16 lists"),
    ("t.jsonl", f'{{"prompt": "[", "freeu": {DEEP}}}\n', "row=0: freeu: more than 16 lists"),
    ("t.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "a", "options": {DEEPER}}}\n', "row=1: options: more than 16"),
    ("t.jsonl", "[" * 100_000, "row=0: "),
])  # fmt: skip
def test_a_table_that_is_none_is_told(tmp_path: Path, name: str, content: str | bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as told:
        read_table(tmp_path / name)
    assert why in str(told.value) and "\n" not in str(told.value)


def test_a_number_of_any_length_is_told_as_what_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"prompt": "a", "seed": {"9" * 300}, "steps": {"9" * 5000}}}\n')
    assert read_table(path) == [{"prompt": "a", "seed": int("9" * 300), "steps": float("inf")}]
    path.write_text('{"prompt": "[[[[[[[[[[[[[[[[[[[[ {", "freeu": [1, 2, 3, 4]}\n')
    assert read_table(path)[0]["freeu"] == [1, 2, 3, 4], "brackets in texts are none"
