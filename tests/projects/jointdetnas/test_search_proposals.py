"""Proposals of algorithm 1: parents, first trials, alternation, mutation of teachers."""

import random
from collections import Counter

import pytest

from kd_d2.projects.jointdetnas import Action, Subnet, SubnetSpace, parse
from kd_d2.projects.jointdetnas.search.methods import (
    SEARCH_METHODS,
    PoolSampling,
    draw_by_rank,
    ranked,
    trial_generator,
)
from kd_d2.projects.jointdetnas.search.mutation import TeacherMutation
from kd_d2.projects.jointdetnas.search.proposal import Outcome, Proposal
from kd_d2.projects.jointdetnas.subnet import Geometry
from tests.fixtures import tiny_cfg
from tests.projects.jointdetnas.cases import STEM
from tests.projects.jointdetnas.elastic_cases import elastic_cfg
from tests.projects.jointdetnas.search_cases import ROOT, SPACE, hill_climbing

LARGEST = str(SPACE.largest)


def outcomes(*scores):
    return [Outcome(n, score, ROOT, LARGEST) for n, score in enumerate(scores)]


def test_rank():
    best = ranked(outcomes(3.0, 5.0, 4.0, 5.0, 1.0))
    assert [o.number for o in best] == [1, 3, 2, 0, 4]


def test_parents_follow_their_rank():
    """5:4:3:2:1 over 3000 draws, among the five best only."""
    known = outcomes(3.0, 7.0, 9.0, 1.0, 8.0, 2.0, 6.0)
    method = hill_climbing()
    counts = Counter(method.propose(n, known).parent for n in range(10, 3010))
    assert sorted(counts) == [0, 1, 2, 4, 6]
    for number, weight in zip((2, 4, 1, 6, 0), (5, 4, 3, 2, 1)):
        assert counts[number] / 3000 == pytest.approx(weight / 15, abs=0.03)
    # fewer than five results
    counts = Counter(
        draw_by_rank(trial_generator(0, n), ranked(known)[:2]).number for n in range(3000)
    )
    assert counts[2] / 3000 == pytest.approx(2 / 3, abs=0.03) and counts[4] == 3000 - counts[2]


def test_base():
    proposal = hill_climbing().propose(0, [])
    assert proposal == Proposal(0, "Base", None, None, LARGEST)
    with pytest.raises(ValueError, match="base pair, trial 0, has no result"):
        hill_climbing().propose(1, [])


def test_student_is_fixed_at_first():
    method = hill_climbing()
    changes = [method.propose(n, outcomes(1.0)).change for n in range(1, 60)]
    assert changes[:5] == ["Teacher"] * 5
    assert set(changes[5:]) == {"Teacher", "ChannelPruning", "LayerPruning", "AddLayer"} | {
        "Rearrange"
    }
    none = hill_climbing(fixed_student_trials=0, student_probability=1.0)
    assert "Teacher" not in {none.propose(n, outcomes(1.0)).change for n in range(1, 60)}


def test_one_half_changes():
    counts, method = Counter(), hill_climbing()
    for number in range(6, 1006):
        proposal = method.propose(number, outcomes(1.0))
        if proposal.change == "Teacher":
            assert proposal.action is None and proposal.teacher != LARGEST
            assert Subnet.parse(proposal.teacher) in SPACE
        else:
            assert proposal.action.name == proposal.change and proposal.teacher == LARGEST
        counts[proposal.change] += 1
    assert counts["Teacher"] / 1000 == pytest.approx(0.5, abs=0.05)
    # uniform over the kinds of actions, not over the actions
    for name in ("ChannelPruning", "LayerPruning", "AddLayer", "Rearrange"):
        assert counts[name] / 1000 == pytest.approx(0.125, abs=0.04)


def test_pure_function_of_number_and_results():
    known = outcomes(3.0, 5.0, 4.0)
    random.seed(1)
    method, same, other = hill_climbing(), hill_climbing(), hill_climbing(seed=1)
    first = [method.propose(n, known) for n in range(3, 30)]
    random.seed(2)
    assert [same.propose(n, known[::-1]) for n in range(29, 2, -1)] == first[::-1]
    assert [other.propose(n, known) for n in range(3, 30)] != first
    # what Python's generator draws for a text is part of the protocol
    assert trial_generator(0, 7).random() == random.Random("0-7").random()


def test_legality_depends_on_the_parent():
    single = parse("[(4,5,16)],[(6,5,24)],[(8,7,28)],[(9,8,36)]", STEM)
    known = [Outcome(0, 1.0, single, LARGEST)]
    method = hill_climbing()
    changes = {method.propose(n, known).change for n in range(6, 100)}
    assert changes == {"Teacher", "ChannelPruning", "AddLayer"}


def test_parts_switched_off():
    known = outcomes(1.0, 3.0, 2.0)
    teachers = hill_climbing(actions=())
    assert {teachers.propose(n, known).change for n in range(3, 60)} == {"Teacher"}
    students = hill_climbing(mutate=False)
    assert {students.propose(n, known).change for n in range(1, 60)} == {
        *("ChannelPruning", "LayerPruning", "AddLayer", "Rearrange")
    }
    # conventional distillation: one round after the other, though the last was not the best
    rounds = hill_climbing(mutate=False, actions=())
    assert rounds.propose(3, known) == Proposal(3, "Nothing", 2, None, LARGEST)


def test_script():
    method = hill_climbing(script=("AddLayer", "Teacher", "", "LayerPruning"))
    known = outcomes(1.0)
    assert [method.propose(n, known).change for n in (1, 2, 4)] == [
        *("AddLayer", "Teacher", "LayerPruning")
    ]
    assert method.propose(3, known) == hill_climbing().propose(3, known)
    # not legal for this student
    single = parse("[(4,5,16)],[(6,5,24)],[(8,7,28)],[(9,8,36)]", STEM)
    known = [Outcome(0, 1.0, single, LARGEST)]
    assert method.propose(4, known).change == "Teacher"
    with pytest.raises(ValueError, match="SCRIPT names 'Grow', known are"):
        hill_climbing(script=("Grow",))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "TOP_K must be at least 1, got 0"),
        ({"student_probability": 1.5}, r"STUDENT_PROBABILITY must be in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        hill_climbing(**options)


def test_as_data():
    for proposal in (
        Proposal(3, "AddLayer", 1, Action("AddLayer", 2), LARGEST),
        Proposal(0, "Base", None, None, "largest"),
    ):
        assert Proposal.from_dict(proposal.to_dict()) == proposal
    assert str(Proposal(3, "AddLayer", 1, Action("AddLayer", 2), "x")) == (
        "AddLayer stage 3, from trial 1"
    )
    assert str(Proposal(3, "Teacher", 1, None, "x")) == "Teacher x, from trial 1"
    assert str(Proposal(0, "Base", None, None, "x")) == "Base x"


# ----------------------------------------------------------------------------------- teachers
def genes(subnet):
    return (*subnet.depths, *subnet.widths, subnet.neck, subnet.stem)


def test_mutation():
    """The paper's pool: ten genes, 0.15 each, at least one; d3 moves by four at most."""
    space = SubnetSpace.of(Geometry(), (2, 2, 2, 2), (4, 5, 6))
    mutate = TeacherMutation(space, probability=0.15, depth_step=4)
    start = Subnet((2, 3, 12, 3), (4, 5, 6, 4), 5, 6)
    generator, counts, values = random.Random(0), Counter(), [Counter() for _ in range(10)]
    for _ in range(4000):
        result = mutate(start, generator)
        assert result in space and result != start
        different = [i for i, (a, b) in enumerate(zip(genes(start), genes(result))) if a != b]
        counts[len(different)] += 1
        for i in different:
            values[i][genes(result)[i]] += 1
    # binomial, with the mass of none moved to one
    assert counts[1] / 4000 == pytest.approx(10 * 0.15 * 0.85**9 + 0.85**10, abs=0.025)
    assert counts[2] / 4000 == pytest.approx(45 * 0.15**2 * 0.85**8, abs=0.025)
    expected = 0.15 + 0.85**10 / 10
    for count in values:
        assert sum(count.values()) / 4000 == pytest.approx(expected, abs=0.025)
    assert sorted(values[2]) == [8, 9, 10, 11, 13, 14, 15, 16]
    assert sorted(values[1]) == [2, 4] and sorted(values[0]) == [3]
    assert (
        sorted(values[5]) == [4, 6] and sorted(values[8]) == [4, 6] and sorted(values[9]) == [4, 5]
    )
    for value in values[2].values():
        assert value / sum(values[2].values()) == pytest.approx(1 / 8, abs=0.05)


def test_mutation_at_the_border_and_without_a_choice():
    space = SubnetSpace(((2, 2), (2, 2), (3, 23), (2, 2)), (6,))
    mutate = TeacherMutation(space, probability=0.0, depth_step=2)
    generator = random.Random(0)
    depths = {mutate(space.largest, generator).depths[2] for _ in range(100)}
    assert depths == {21, 22}
    alone = TeacherMutation(SubnetSpace(((2, 2),) * 4, (6,)), probability=0.15, depth_step=4)
    assert alone.genes(alone.space.largest) == []
    with pytest.raises(ValueError, match="no subnet but d2-2-2-2_w6-6-6-6_n6_s6"):
        alone(alone.space.largest, generator)
    for options in ({"probability": 1.1, "depth_step": 1}, {"probability": 0.5, "depth_step": 0}):
        with pytest.raises(ValueError, match="SEARCH.MUTATION"):
            TeacherMutation(space, **options)


def test_pool_without_a_choice_leaves_the_teacher_alone():
    method = hill_climbing(actions=())
    method.mutation.space = SubnetSpace(((2, 2), (2, 2), (3, 3), (2, 2)), (6,))
    assert method.propose(1, outcomes(1.0)).change == "Nothing"


def test_pool_sampling():
    method = PoolSampling(seed=3, space=SPACE, first=LARGEST)
    assert method.propose(0, []) == Proposal(0, "Pool", None, None, LARGEST)
    draws = [method.propose(n, []) for n in range(1, 30)]
    assert all(Subnet.parse(p.teacher) in SPACE and p.parent is None for p in draws)
    assert len({p.teacher for p in draws}) > 20
    assert [method.propose(n, outcomes(1.0, 2.0)) for n in range(1, 30)] == draws


def test_from_config():
    cfg = tiny_cfg("GeneralizedRCNN", **{"SEARCH.TOP_K": 3, "SEARCH.SCRIPT": ("Teacher",)})
    pool = elastic_cfg()
    method = SEARCH_METHODS.get("HillClimbing")(cfg, pool)
    assert method.first_teacher == "d2-2-3-2_w6-6-6-6_n6_s6"
    assert (method.seed, method.top_k, method.script) == (7, 3, ("Teacher",))
    assert method.mutation.depth_step == 4 and method.mutation.probability == 0.15
    assert str(method.morphism.actions["AddLayer"].max_depth) == "(6, 7, 9, 6)"  # "r50"
    with pytest.raises(ValueError, match="TEACHER_MUTATION is True, but there is no pool"):
        SEARCH_METHODS.get("HillClimbing")(cfg, None)
    with pytest.raises(ValueError, match="draws subnets of a pool"):
        SEARCH_METHODS.get("PoolSampling")(cfg, None)
    assert SEARCH_METHODS.get("PoolSampling")(cfg, pool).first == method.first_teacher
    cfg.SEARCH.TEACHER_MUTATION = False
    alone = SEARCH_METHODS.get("HillClimbing")(cfg, None)
    assert alone.mutation is None and alone.first_teacher == "largest"
    cfg.SEED = -1
    with pytest.raises(ValueError, match="SEED of a search must be 0 or more, got -1"):
        SEARCH_METHODS.get("HillClimbing")(cfg, None)
