"""Keys in which configs differ."""

from kd_d2.report.config_diff import ABSENT, Difference, differences, group_of


def test_only_what_differs():
    first = {"A": {"B": 1, "C": [1, 2]}, "SEED": 1, "OUTPUT_DIR": "x", "N": {}}
    second = {"A": {"B": 2, "C": (1, 2)}, "SEED": 1, "OUTPUT_DIR": "y", "N": {}}
    assert differences([first, second]) == [Difference("A.B", (1, 2))]
    assert differences([first, first]) == [] and differences([first]) == []


def test_a_key_that_one_config_lacks():
    found = differences([{"A": {"B": 1}}, {"A": {}}, {"A": {"B": 1}}])
    assert found == [Difference("A", (ABSENT, {}, ABSENT)), Difference("A.B", (1, ABSENT, 1))]


def test_true_is_not_one_but_one_is_one():
    assert differences([{"A": True}, {"A": 1}]) == [Difference("A", (True, 1))]
    assert differences([{"A": 1.0}, {"A": 1}]) == []
    assert differences([{"A": [True]}, {"A": [1]}]) == [Difference("A", ([True], [1]))]


def test_groups_are_together():
    assert group_of("KD.PKD.WEIGHT") == "KD.PKD" and group_of("KD.ENABLED") == "KD"
    assert group_of("SOLVER.AMP.ENABLED") == "SOLVER" and group_of("SEED") == "SEED"
    first = {"MODEL": {"GFL": {"A": 1}, "META": 1, "X": {"B": 1}}}
    second = {"MODEL": {"GFL": {"A": 2}, "META": 2, "X": {"B": 2}}}
    keys = [difference.key for difference in differences([first, second])]
    assert keys == ["MODEL.META", "MODEL.GFL.A", "MODEL.X.B"]
