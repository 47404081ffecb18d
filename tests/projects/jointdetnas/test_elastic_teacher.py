"""ElasticTeacher: frozen, recalibrated, exchanged; its store; training with it."""

import os
import random

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.distillation import DetectorTeacher, build_teacher
from kd_d2.engine import KDTrainer
from kd_d2.projects.jointdetnas.elastic_config import pool_of
from kd_d2.projects.jointdetnas.extraction import CalibrationBatches, extract, recalibrate
from kd_d2.projects.jointdetnas.subnet import Subnet
from kd_d2.projects.jointdetnas.subnet_store import SubnetStore
from kd_d2.projects.jointdetnas.teacher import ElasticTeacher
from tests.fixtures import CLASSES, registered_toy_dataset, tiny_batch, tiny_cfg
from tests.projects.jointdetnas.elastic_cases import elastic_cfg, image, supernet

SMALL, OTHER = "d1-1-1-1_w4-4-4-4_n4_s4", "d2-1-3-1_w5-4-6-4_n5_s6"
# not of the paper's size
FEW = {
    "MODEL.ELASTIC_RESNET.RECALIBRATION.BATCHES": 2,
    "MODEL.ELASTIC_RESNET.RECALIBRATION.IMAGES": 2,
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A function that returns the config of a student with an ElasticTeacher of a stored pool."""
    folder = tmp_path_factory.mktemp("pool")
    _, net = supernet()
    data = {"model": net.model.state_dict(), "run_info": {"classes": list(CLASSES)}}
    data["arch"] = net.model.backbone.bottom_up.architecture_entry(net.model)
    torch.save(data, folder / "pool.pth")
    with registered_toy_dataset(folder, 6, size=(60, 80)) as name:
        cfg = elastic_cfg(**FEW, **{"DATASETS.TRAIN": (name,)})
        (folder / "pool.yaml").write_text(cfg.dump())

        def student_cfg(**overrides):
            return tiny_cfg(
                "GeneralizedRCNN",
                **{
                    "DATASETS.TRAIN": (name,),
                    "KD.ENABLED": True,
                    "KD.DISTILLERS": ("JointDetNAS",),
                    "KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS": 48,
                    "KD.TEACHER.TYPE": "ElasticTeacher",
                    "KD.TEACHER.CONFIG_FILE": str(folder / "pool.yaml"),
                    "KD.TEACHER.WEIGHTS": str(folder / "pool.pth"),
                    "KD.TEACHER.ELASTIC.SUBNET": SMALL,
                    **overrides,
                },
            )

        yield student_cfg


def reference(cfg, code):
    """What the teacher should be, without it: extracted and recalibrated by hand."""
    pool_cfg = DetectorTeacher.load_config(cfg)
    _, net = supernet()
    _, model = extract(pool_cfg, net.model, Subnet.parse(code))
    recalibrate(model, CalibrationBatches(pool_cfg))
    return model


@torch.no_grad()
def pyramid(model):
    return model.backbone(image())["p3"]


def assert_near(ours, theirs):
    """Norms are part of the convs on one side only."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_it_is_the_recalibrated_subnet(pool):
    cfg = pool()
    teacher = build_teacher(cfg)
    assert str(teacher.active) == SMALL and teacher.classes == list(CLASSES)
    assert_near(pyramid(teacher.model), pyramid(reference(cfg, SMALL)))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.keys["roi.feat"].channels == 32
    assert teacher.keys["backbone.res4"].channels == 128
    assert SMALL in teacher.describe() and "0.23 M" in teacher.describe()
    teacher.activate(OTHER)
    assert str(teacher.active) == OTHER and teacher.keys["roi.feat"].channels == 40
    assert_near(pyramid(teacher.model), pyramid(reference(cfg, OTHER)))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    # whatever was active in between
    teacher.activate(Subnet.parse(SMALL))
    assert_near(pyramid(teacher.model), pyramid(reference(cfg, SMALL)))
    assert not isinstance(teacher, torch.nn.Module)


def test_names_of_corners_and_draws(pool):
    teacher = build_teacher(pool(**{"KD.TEACHER.ELASTIC.SUBNET": "largest"}))
    assert str(teacher.active) == "d2-2-3-2_w6-6-6-6_n6_s6"
    space = pool_of(elastic_cfg())[1]
    ours = [teacher.sample(random.Random(i)) for i in range(5)]
    assert ours == [space.sample(random.Random(i)) for i in range(5)]
    assert str(teacher.active) == "d2-2-3-2_w6-6-6-6_n6_s6"
    with pytest.raises(ValueError, match="no part of the supernet"):
        teacher.activate("d2-2-4-2_w6-6-6-6_n6_s6")
    assert str(teacher.active) == "d2-2-3-2_w6-6-6-6_n6_s6"


def test_recalibration_on_other_images(pool):
    teacher = build_teacher(pool())
    before = pyramid(teacher.model)
    batches = [tiny_batch(sizes=((64, 96),), seed=5)]
    teacher.recalibrate(batches)
    _, net = supernet()
    _, model = extract(elastic_cfg(), net.model, Subnet.parse(SMALL))
    recalibrate(model, batches)
    assert_near(pyramid(teacher.model), pyramid(model))
    assert not torch.allclose(pyramid(teacher.model), before)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_supernet_is_not_changed(pool):
    teacher = build_teacher(pool())
    expected = supernet()[1].model.state_dict()
    teacher.activate(OTHER)
    teacher.recalibrate([tiny_batch(sizes=((64, 96),))])
    for key, value in teacher._supernet.state_dict().items():
        assert torch.equal(value, expected[key]), key


# -------------------------------------------------------------------------------------- store
def test_store_makes_each_subnet_once(pool, tmp_path, monkeypatch):
    cfg = pool(**{"KD.TEACHER.ELASTIC.STORE": str(tmp_path / "teachers")})
    teacher = build_teacher(cfg)
    folder = tmp_path / "teachers" / SMALL
    assert sorted(os.listdir(folder)) == ["config.yaml", "model.pth"]
    assert_near(pyramid(teacher.model), pyramid(reference(cfg, SMALL)))
    module = "kd_d2.projects.jointdetnas.teacher.recalibrate"

    def never(*_):
        raise AssertionError("recalibrated again")

    with monkeypatch.context() as patch:
        patch.setattr(module, never)
        again = build_teacher(cfg)
        assert torch.equal(pyramid(again.model), pyramid(teacher.model))
        with pytest.raises(AssertionError, match="again"):
            again.activate(OTHER)
    # statistics of another way are not taken
    other = cfg.clone()
    other.KD.TEACHER.OPTS = ["MODEL.ELASTIC_RESNET.RECALIBRATION.SEED", "3"]
    third = build_teacher(other)
    assert not torch.equal(pyramid(third.model), pyramid(teacher.model))


def test_stored_subnet_is_an_ordinary_detector(pool, tmp_path):
    cfg = pool(**{"KD.TEACHER.ELASTIC.STORE": str(tmp_path)})
    teacher = build_teacher(cfg)
    plain = cfg.clone()
    plain.KD.TEACHER.TYPE = "DetectorTeacher"
    plain.KD.TEACHER.CONFIG_FILE = str(tmp_path / SMALL / "config.yaml")
    plain.KD.TEACHER.WEIGHTS = str(tmp_path / SMALL / "model.pth")
    detector = build_teacher(plain)
    assert detector.classes == list(CLASSES)
    assert torch.equal(pyramid(detector.model), pyramid(teacher.model))
    # and the encoding in the file is checked
    wrong = plain.clone()
    wrong.KD.TEACHER.OPTS = ["MODEL.MORPH_RESNET.ENCODING", "r50"]
    with pytest.raises(ValueError, match="encoding"):
        build_teacher(wrong)


def test_a_kill_while_writing_leaves_nothing_to_read(pool, tmp_path, monkeypatch):
    store = SubnetStore(str(tmp_path), {"weights": "a"})
    cfg, net = supernet()
    sub_cfg, model = extract(cfg, net.model, Subnet.parse(SMALL))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kd_d2.projects.jointdetnas.subnet_store.atomic_save", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(Subnet.parse(SMALL), sub_cfg, model)
    assert store.read(Subnet.parse(SMALL)) is None
    store.write(Subnet.parse(SMALL), sub_cfg, model)
    state = store.read(Subnet.parse(SMALL))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert SubnetStore(str(tmp_path), {"weights": "b"}).read(Subnet.parse(SMALL)) is None


# ------------------------------------------------------------------------------------- errors
def test_pools_of_another_geometry_are_refused(pool):
    cfg = pool()
    cfg.KD.TEACHER.OPTS = ["MODEL.ELASTIC_RESNET.DEPTHS", "(2,2,4,2)"]
    with pytest.raises(ValueError, match="MODEL.ELASTIC_RESNET describes"):
        build_teacher(cfg)
    _, net = supernet()
    bigger = elastic_cfg(**{"MODEL.FPN.OUT_CHANNELS": 64})
    with pytest.raises(ValueError, match="describes"):
        KDCheckpointer(build_model(bigger)).load(cfg.KD.TEACHER.WEIGHTS)


def test_weights_are_needed(pool):
    with pytest.raises(ValueError, match="KD.TEACHER.WEIGHTS is empty"):
        build_teacher(pool(**{"KD.TEACHER.WEIGHTS": ""}))


# ----------------------------------------------------------------------------------- training
def test_training_with_it(pool, tmp_path):
    cfg = pool(**{"OUTPUT_DIR": str(tmp_path), "SOLVER.MAX_ITER": 2})
    seed_all_rng(1)
    trainer = KDTrainer(cfg)
    assert isinstance(trainer.teacher, ElasticTeacher)
    before = pyramid(trainer.teacher.model)
    inside = {id(t) for t in trainer.model.parameters()}
    assert not inside & {id(p) for p in trainer.teacher._supernet.parameters()}
    trainer.train()
    latest = trainer.storage.latest()
    assert all(latest[f"loss_kd/jointdetnas/{t}"][0] > 0 for t in ("feat", "cls", "reg"))
    assert torch.equal(pyramid(trainer.teacher.model), before)
    # exchanged between two steps, the adapter stays
    trainer.teacher.activate(OTHER)
    with EventStorage():
        losses = trainer.model(tiny_batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    stored = torch.load(tmp_path / "model_final.pth")
    assert stored["distillers"]["jointdetnas.adapter.weight"].shape == (48, 32, 3, 3)
    assert not any("supernet" in key for key in stored["model"])
