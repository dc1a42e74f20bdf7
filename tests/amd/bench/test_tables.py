from __future__ import annotations

from amd.bench.tables import ROWS, data_table, step_table


def test_a_step_table_has_dotted_keys_and_omits_unmeasured_metrics() -> None:
    table = step_table({"device": "cpu", "share": {"data": 0.25, "teacher": 0.123456}, "peak_memory_gib": None})
    assert table.rows == [["device", "cpu"], ["share.data", "0.25"], ["share.teacher", "0.1235"]]
    assert str(table).splitlines() == ["One training step", "device            cpu", *str(table).splitlines()[2:]]
    assert len({len(line) for line in str(table).splitlines()[1:]}) == 1


def test_a_data_table_has_one_column_per_data_set() -> None:
    measured = {key: 2 for key, _ in ROWS.values()}
    unmeasured = dict.fromkeys(measured)
    sets = [{**measured, "name": "a"}, {**unmeasured, "name": "b"}]
    table = data_table({"frames": 16, "size": [224, 224], "sets": sets})
    assert table.title == "Reading clips of 16 x 224 x 224 on one core"
    assert table.header == ["", "a", "b"]
    assert table.rows[0] == ["read a sample's bytes", "2.00 ms", "-"]
    assert len(table.rows) == len(ROWS)
