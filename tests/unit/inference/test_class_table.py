from pipeline.inference.class_table import class_table


def test_last_and_best():
    table = class_table(("sky", "bicyclist", "void"), (0.9, 0.1234, None), (0.95, 0.25, None))
    assert table.splitlines() == [
        "class        last    best",
        "-------------------------",
        "sky         90.00   95.00",
        "bicyclist   12.34   25.00",
        "void            -       -",
        "-------------------------",
        "mIoU        51.17   60.00",
    ]


def test_last_alone():
    assert class_table(("a",), (1.0,)).splitlines()[2:] == ["a      100.00", "-------------", "mIoU   100.00"]


def test_nothing_present():
    assert class_table(("a",), (None,)).splitlines()[-1] == "mIoU        -"
