"""Feature terms: which RoIs and levels are compared, with what of the teacher, what is logged."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.distillation import DistillationContext, StudentView, build_tap
from kd_d2.projects.gdetkd.feature_terms import FEATURE_TERMS, build_feature_term
from kd_d2.projects.gdetkd.level_pooling import pool_all_levels
from kd_d2.projects.gdetkd.records import RoIBatch
from kd_d2.projects.gdetkd.sgfi import SGFI
from tests.fixtures import teacher_of, tiny_batch, tiny_cfg, tiny_model

SEVEN = {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7, "MODEL.RESNETS.DEPTH": 18}
FASTER = "GeneralizedRCNN"


class Pair:
    """A toy student and teacher, and a step of both on given boxes."""

    def __init__(self, student=FASTER, teacher=FASTER, same=False, **changes):
        resolution = {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 8} if teacher == "C4" else SEVEN
        self.cfg = tiny_cfg(student, **changes)
        self.student = tiny_model(student, seed=1, **SEVEN)
        model = tiny_model(student, seed=1, **SEVEN) if same else tiny_cfg(teacher, **resolution)
        self.teacher = teacher_of(model, seed=2)
        self.student_keys = build_tap(self.student).keys(self.student)

    def term(self):
        torch.manual_seed(0)
        return build_feature_term(self.cfg, self.student_keys, self.teacher.keys)

    def step(self, term, rois, batch=None):
        """(loss, scalars, student's values, teacher's roi.feat) of one training step."""
        batch, tap = batch or tiny_batch(), build_tap(self.student)
        with EventStorage() as storage, tap.observe(self.student, term.student_needs) as seen:
            self.student(batch)
            ground_truth = [x["instances"] for x in batch]
            seen.gt_instances = ground_truth
            size = tuple(seen.single("backbone").inputs[0].shape[-2:])
            run = self.teacher.start(batch, size, term.teacher_needs, ground_truth)
            values = StudentView(seen)
            context = DistillationContext(
                batched_inputs=batch,
                gt_instances=ground_truth,
                padded_size=size,
                student=values,
                teacher=run,
                iteration=0,
            )
            expected = run.run(["roi.feat"], rois.boxes)["roi.feat"]
            loss = term(context, rois)
            scalars = {k: v[0] for k, v in storage.latest().items() if k.startswith("gdetkd/")}
            return loss, scalars, {k: values[k] for k in term.student_needs}, expected


def rois(*positive, size=128.0):
    """Random boxes; ``positive`` has one list of flags an image."""
    flags = torch.tensor([flag for image in positive for flag in image], dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(len(flags), 2, generator=generator) * size / 2
    sides = 8 + torch.rand(len(flags), 2, generator=generator) * (size / 2 - 8)
    boxes = torch.cat([corners, corners + sides], dim=1)
    return RoIBatch(
        boxes=[Boxes(b) for b in boxes.split([len(image) for image in positive])],
        gt_classes=torch.where(flags, 1, 3),
        gt_boxes=boxes,
        num_classes=3,
        embed=torch.zeros(len(flags), 1),
    )


MIXED = ([1, 0, 1, 0], [0, 1, 0])


# -------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("which, rows", [("positive", [0, 2, 5]), ("all", list(range(7)))])
def test_sgfi_compares_the_chosen_rows_with_the_teachers(which, rows):
    pair = Pair(**{"KD.GDETKD.SGFI.ROIS": which})
    term = pair.term()
    boxes = rois(*MIXED)
    loss, scalars, values, teacher = pair.step(term, boxes)
    assert term.student_needs == tuple(f"neck.p{k}" for k in (2, 3, 4, 5, 6))
    student = pool_all_levels(list(values.values()), (4, 8, 16, 32, 64), boxes.boxes, (7, 7), 4)
    output = term.sgfi(student[rows], teacher[rows])
    torch.testing.assert_close(loss, output.loss)
    assert loss.item() > 0 and loss.dtype == torch.float32
    alpha = output.alpha
    assert scalars == pytest.approx(
        {
            "gdetkd/sgfi_rois": len(rows),
            "gdetkd/sgfi_tau": 128**0.5,
            "gdetkd/sgfi_entropy": -(alpha * alpha.log()).sum(1).mean().item(),
            **{f"gdetkd/sgfi_alpha_p{k + 2}": alpha[:, k].mean().item() for k in range(5)},
        },
        rel=1e-5,
    )


def test_roifi_of_a_network_with_itself_is_zero():
    pair = Pair(same=True, **{"KD.GDETKD.FEAT.MODE": "roifi", "KD.GDETKD.SGFI.SAMPLING_RATIO": 0})
    term = pair.term()
    assert term.student_needs == tuple(f"neck.p{k}" for k in (2, 3, 4, 5))
    assert {name for name, _ in term.named_parameters()} == {"sgfi.adapt.weight", "sgfi.adapt.bias"}
    nn.init.dirac_(term.sgfi.adapt.weight)
    loss, scalars, _, _ = pair.step(term, rois(*MIXED))
    assert loss.item() == pytest.approx(0, abs=1e-10)
    assert scalars == {"gdetkd/roifi_rois": 3}
    nn.init.dirac_(pair.term().sgfi.adapt.weight)
    assert pair.step(pair.term(), rois(*MIXED))[0].item() > 1e-3


def test_gradients_reach_the_student_and_no_teacher():
    pair = Pair()
    term = pair.term()
    loss, _, values, teacher = pair.step(term, rois(*MIXED))
    gradients = torch.autograd.grad(loss, [*values.values(), *term.parameters()], retain_graph=True)
    assert all(g.any() for g in gradients)
    assert not teacher.requires_grad
    loss.backward()
    assert all(p.grad is None for p in pair.teacher.model.parameters())
    assert pair.student.backbone.bottom_up.stem.conv1.weight.grad.any()
    assert pair.student.roi_heads.box_predictor.cls_score.weight.grad is None


@pytest.mark.parametrize("mode", ["sgfi", "roifi"])
@pytest.mark.parametrize("positive", [([0, 0], [0]), ([], []), ([1, 1, 0, 1], [])])
def test_images_without_positive_rois(mode, positive):
    pair = Pair(**{"KD.GDETKD.FEAT.MODE": mode})
    term = pair.term()
    loss, scalars, _, teacher = pair.step(term, rois(*positive), tiny_batch(num_gt=0))
    count = sum(map(sum, positive))
    assert teacher.shape == (sum(map(len, positive)), 32, 7, 7)
    assert scalars[f"gdetkd/{mode}_rois"] == count and all(
        torch.tensor(list(scalars.values())).isfinite()
    )
    assert (loss.item() == 0) == (count == 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters())


# ------------------------------------------------------------------------------- choice of rows
def chosen(batch, **values):
    keys = {"neck.p3": SimpleNamespace(channels=2, strides=(8,))}
    info = SimpleNamespace(channels=2, signature=(7, 7))
    return FEATURE_TERMS.get("sgfi")(levels=keys, roi_feat=info, **values).chosen(batch)


def test_at_most_so_many_rois_an_image():
    batch = rois([1] * 10 + [0] * 5, [0] * 3, [1, 1], [1] * 4)
    counts = [15, 3, 2, 4]
    seen = torch.zeros(24)
    for seed in range(30):
        torch.manual_seed(seed)
        mask = chosen(batch, max_rois_per_image=3)
        assert [m.sum().item() for m in mask.split(counts)] == [3, 0, 2, 3]
        assert not (mask & ~batch.positive).any()
        seen += mask
    # every positive one has its turn
    assert torch.equal(seen > 0, batch.positive)
    assert torch.equal(chosen(batch, max_rois_per_image=0), batch.positive)
    assert torch.equal(chosen(batch, max_rois_per_image=10), batch.positive)
    everything = chosen(batch, rois="all", max_rois_per_image=4)
    assert [m.sum().item() for m in everything.split(counts)] == [4, 3, 2, 4]
    assert chosen(batch, rois="all", max_rois_per_image=0).all()


# ---------------------------------------------------------------------------------------- pairs
@pytest.mark.parametrize(
    "student, teacher, mode, levels, channels",
    [
        ("Cascade", FASTER, "sgfi", ("p2", "p3", "p4", "p5", "p6"), (32, 32)),
        ("C4", "C4", "sgfi", ("res4",), (256, 256)),
        ("C4", FASTER, "sgfi", ("res4",), (256, 32)),
        (FASTER, "C4", "sgfi", ("p2", "p3", "p4", "p5", "p6"), (32, 256)),
        (FASTER, "Cascade", "roifi", ("p2", "p3", "p4", "p5"), (32, 32)),
        ("RetinaNet", FASTER, "sgfi", ("p3", "p4", "p5", "p6", "p7"), (32, 32)),
        ("FCOS", FASTER, "roifi", ("p3", "p4", "p5", "p6", "p7"), (32, 32)),
    ],
)
def test_any_student_of_any_two_stage_teacher(student, teacher, mode, levels, channels):
    pair = Pair(student, teacher, **{"KD.GDETKD.FEAT.MODE": mode})
    term = pair.term()
    assert term.student_needs == tuple(f"neck.{name}" for name in levels)
    adapt = term.sgfi.adapt
    assert (adapt.in_channels, adapt.out_channels) == channels
    weighted = len(levels) > 1 and mode == "sgfi"
    assert hasattr(term.sgfi, "log_tau") == weighted
    expected = {"sgfi.log_tau": {"weight_decay": 0.0}} if weighted else {}
    assert term.optimizer_overrides() == expected
    loss, _, _, _ = pair.step(term, rois(*MIXED))
    loss.backward()
    assert loss.item() > 0 and all(p.grad.any() for p in term.parameters())


def test_some_levels_only():
    pair = Pair(**{"KD.GDETKD.SGFI.STUDENT_LEVELS": "p5, p3"})
    assert pair.term().student_needs == ("neck.p3", "neck.p5")
    assert pair.term().strides == [8, 32]


def test_values_of_the_config_arrive():
    node = {"KEY_DIM": 16, "TAU_INIT": 2.0, "CHUNK": 1, "MAX_ROIS_PER_IMAGE": 1}
    pair = Pair(**{f"KD.GDETKD.SGFI.{key}": value for key, value in node.items()})
    term = pair.term()
    assert isinstance(term.sgfi, SGFI) and term.sgfi.embed[0].out_channels == 16
    loss, scalars, _, _ = pair.step(term, rois(*MIXED))
    assert scalars["gdetkd/sgfi_tau"] == pytest.approx(2) and scalars["gdetkd/sgfi_rois"] == 2
    loss.backward()
    assert all(p.grad.any() for p in term.parameters())


def test_no_term():
    assert Pair(**{"KD.GDETKD.FEAT.MODE": "none"}).term() is None


@pytest.mark.parametrize(
    "values, words",
    [
        ({"KD.GDETKD.FEAT.MODE": "sgfy"}, r"FEAT\.MODE must be one of .*'none'.*'sgfi'.*'sgfy'"),
        ({"KD.GDETKD.SGFI.STUDENT_LEVELS": "p3,p9"}, r"STUDENT_LEVELS is 'p3,p9'.*p2, p3, p4"),
        ({"KD.GDETKD.SGFI.ROIS": "negative"}, r"SGFI\.ROIS must be one of"),
        ({"KD.GDETKD.SGFI.SAMPLING_RATIO": -1}, r"SGFI\.SAMPLING_RATIO must be at least 0, got -1"),
        ({"KD.GDETKD.SGFI.MAX_ROIS_PER_IMAGE": -1}, r"SGFI\.MAX_ROIS_PER_IMAGE must be at least 0"),
    ],
)
def test_errors_name_the_key(values, words):
    with pytest.raises(ValueError, match=words):
        Pair(**values).term()


def test_teachers_that_do_not_fit():
    pair = Pair()
    pair.teacher = teacher_of(tiny_cfg("RetinaNet"))
    with pytest.raises(ValueError, match="no RoI head.*KD.TEACHER.CONFIG_FILE"):
        pair.term()
    pair.teacher = teacher_of(tiny_cfg(FASTER))
    with pytest.raises(ValueError, match="7x7 .*pools 5x5.*POOLER_RESOLUTION 7"):
        pair.term()
