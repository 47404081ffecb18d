"""All actions together: legality, random sequences on real detectors, configs."""

import random

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.projects.jointdetnas import Action, StudentMorphism, parse, resolve
from kd_d2.projects.jointdetnas.cost import backbone_cost, total
from kd_d2.projects.jointdetnas.evolve import calibration_images
from kd_d2.projects.jointdetnas.space import Architecture
from tests.fixtures import tiny_batch, tiny_cfg
from tests.projects.jointdetnas.cases import (
    ALL,
    BASIC,
    BOTTLENECK,
    STEM,
    bottom_up,
    detections,
    images,
    student,
)


def morphism(root=BOTTLENECK, **keys):
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.SEARCH.CHANNEL_PRUNING.PERCENT = 0.1
    cfg.SEARCH.CHANNEL_PRUNING.MIN_CHANNELS = 2
    cfg.SEARCH.ADD_LAYER.EXTRA_DEPTH = 1
    cfg.SEARCH.LAYER_PRUNING.PROTECT = 1
    for key, value in keys.items():
        cfg.SEARCH[key] = value
    return StudentMorphism(cfg, parse(root, STEM))


def test_legal_actions():
    legal = morphism().legal(parse(BOTTLENECK, STEM))
    assert list(legal) == ["ChannelPruning", "LayerPruning", "AddLayer", "Rearrange"]
    assert legal["ChannelPruning"] == [Action("ChannelPruning")]
    assert legal["AddLayer"] == [Action("AddLayer", s) for s in range(4)]
    assert len(legal["Rearrange"]) == 6
    # a network of single blocks can only grow and get narrower
    single = parse("[(4,5,16)],[(6,5,24)],[(8,7,28)],[(9,8,36)]", STEM)
    assert list(morphism().legal(single)) == ["ChannelPruning", "AddLayer"]


def test_actions_of_the_config():
    some = morphism(STUDENT_ACTIONS=("AddLayer",))
    assert list(some.legal(parse(BOTTLENECK, STEM))) == ["AddLayer"]
    assert morphism(STUDENT_ACTIONS=()).legal(parse(BOTTLENECK, STEM)) == {}
    with pytest.raises(ValueError, match="STUDENT_ACTIONS names 'Grow', known are .*'AddLayer'"):
        morphism(STUDENT_ACTIONS=("Grow",))
    with pytest.raises(ValueError, match="'Rearrange stage 1 right' is none of .'AddLayer'"):
        some.evolve(student(), Action("Rearrange", 0, "right"))


@pytest.mark.parametrize(
    "action",
    [Action("AddLayer", 9), Action("Rearrange", 3, "right"), Action("Rearrange", 0, "up")],
)
def test_illegal_actions_are_refused(action):
    with pytest.raises(ValueError, match=f"'{action}' is not legal for "):
        morphism().evolve(student(), action)


def test_actions_as_data():
    for action in [Action("ChannelPruning"), Action("Rearrange", 0, "left")]:
        assert Action.from_dict(action.to_dict()) == action
    assert Action("Rearrange", 0, "left").to_dict() == {
        "name": "Rearrange",
        "stage": 0,
        "direction": "left",
    }
    assert str(Action("AddLayer", 2)) == "AddLayer stage 3"


def all_tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name, seed", [("basic", 0), ("bottleneck", 1), ("grouped", 2)])
def test_random_sequences(name, seed, tmp_path):
    """Every step: the model is what its encoding says, shares nothing, trains and detects."""
    draw = random.Random(seed)
    root = ALL[name]
    evolve = morphism(root)
    model = student(root)
    seen = set()
    for step in range(20):
        architecture = bottom_up(model).architecture
        legal = evolve.legal(architecture)
        kind = draw.choice(sorted(legal))
        action = draw.choice(legal[kind])
        seen.add(kind)
        before = [t.clone() for t in all_tensors(model)]
        child = evolve.evolve(model, action, [images(64, 64)])
        assert bottom_up(model).architecture == architecture
        assert all(torch.equal(a, b) for a, b in zip(all_tensors(model), before))
        storages = {t.untyped_storage().data_ptr() for t in all_tensors(model)}
        assert not storages & {t.untyped_storage().data_ptr() for t in all_tensors(child)}
        changed = bottom_up(child).architecture
        assert changed != architecture, action
        assert parse(str(changed), STEM) == changed
        cost = total(backbone_cost(changed, (64, 64)))
        assert cost.parameters == sum(p.numel() for p in bottom_up(child).parameters())
        if step % 5 == 4:
            height, width = ((96, 128), (97, 131))[step % 2]
            check_works(child, height, width)
            bottom_up(child).architecture = changed.older()
        model = child
    assert seen == set(evolve.actions)
    # from a file into a model built from the text
    KDCheckpointer(model, str(tmp_path)).save("model")
    fresh = student(str(bottom_up(model).architecture), seed=9)
    KDCheckpointer(fresh).load(str(tmp_path / "model.pth"))
    ours, theirs = (detections(m)[0]["instances"] for m in (model, fresh))
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


def check_works(model, height, width):
    model.train()
    with EventStorage(0):
        losses = model(tiny_batch(sizes=((height, width), (64, 64)), num_gt=(2, 0)))
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in bottom_up(model).parameters())
    assert torch.isfinite(detections(model, height, width)[0]["instances"].scores).all()
    model.zero_grad()


def test_ages_through_a_sequence():
    evolve = morphism()
    model = evolve.evolve(student(), Action("AddLayer", 1))
    model = evolve.evolve(model, Action("Rearrange", 1, "right"))
    bottom_up(model).architecture = bottom_up(model).architecture.older()
    model = evolve.evolve(model, Action("ChannelPruning"))
    entry = bottom_up(model).architecture_entry(model)
    assert entry["age"] == [100] * 5 + [1] + [100] * 4
    assert Architecture.from_entry(entry).block((2, 0)).age == 1


def test_gradients_do_not_reach_the_parent():
    model = student(BASIC).train()
    child = morphism(BASIC).evolve(model, Action("ChannelPruning"))
    with EventStorage(0):
        sum(child(tiny_batch()).values()).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.is_leaf for p in child.parameters())


def test_calibration_images_are_what_the_backbone_sees():
    model = student()
    batches = [tiny_batch(seed=s, sizes=((60, 70), (64, 50))) for s in range(3)]
    found = calibration_images(model, iter(batches), 2)
    assert [tuple(x.shape) for x in found] == [(2, 3, 64, 96)] * 2
    image = batches[1][1]["image"].float()
    expected = (image - model.pixel_mean) / model.pixel_std
    assert torch.allclose(found[1][1, :, :64, :50], expected)
    assert not found[1][1, :, :, 50:].any()


def test_one_hundred_steps_of_the_space_alone():
    """Without weights: legal actions of an R-101 exist as long as it has channels."""
    cfg = tiny_cfg("GeneralizedRCNN")
    evolve = StudentMorphism(cfg, resolve("r101"))
    legal = evolve.legal(resolve("searched_r101"))
    assert {k: len(v) for k, v in legal.items()} == {
        "ChannelPruning": 1,
        "LayerPruning": 1,
        "AddLayer": 4,
        "Rearrange": 6,
    }
