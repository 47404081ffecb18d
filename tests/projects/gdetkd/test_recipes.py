"""The recipes say what the rows of the paper's tables say, and every kind of them can train."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.distillation import DetectorTeacher
from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config
from kd_d2.engine.optimizer import build_optimizer
from tests.fixtures import tiny_batch

PROJECT = Path(__file__).parents[3] / "projects/GDetKD"
CONFIGS = PROJECT / "configs"
README = (PROJECT / "README.md").read_text()

R50, X101, X152 = (
    "faster_rcnn_r50_3x",
    "mask_rcnn_x101_32x8d_3x",
    "cascade_mask_rcnn_x152_32x8d_dconv",
)
FULL = {"feat": "sgfi", "ckd": True, "cls": True, "reg": "", "transfer": True}
DENSE = {"feat": "sgfi", "ckd": True, "cls": "off", "reg": "off", "transfer": False}


def _only(**on):
    off = {"feat": "none", "ckd": False, "cls": False, "reg": "off", "transfer": False}
    return {**off, **on}


def _dense(**on):
    return {"feat": "none", "ckd": False, "cls": "off", "reg": "off", "transfer": False, **on}


RCNN18, RETINA18, FCOS18 = ("RCNN", 18, R50), ("RetinaNet", 18, R50), ("FCOS", 18, R50)
PRED = {"cls": "max_norm", "reg": "l1"}
# row: (student, depth, teacher), terms, published AP
ROWS = {
    "faster_rcnn_r18_r50_1x": (RCNN18, FULL, 37.9),
    "table2_sgfi": (RCNN18, _only(feat="sgfi"), 36.7),
    "table2_ckd": (RCNN18, _only(ckd=True), 37.1),
    "table2_pred": (RCNN18, _only(cls=True, reg="gt_class"), 36.4),
    "table2_pred_caware": (RCNN18, _only(cls=True, reg=""), 37.0),
    "table2_head_transfer": (RCNN18, _only(transfer=True), 35.3),
    "table2_sgfi_ckd": (RCNN18, _only(feat="sgfi", ckd=True), 37.6),
    "table6_whole": (RCNN18, _only(feat="whole"), 35.2),
    "table6_anchor_mask": (RCNN18, _only(feat="anchor_mask"), 35.6),
    "table6_gaussian_mask": (RCNN18, _only(feat="gaussian_mask"), 35.4),
    "table6_gt_mask": (RCNN18, _only(feat="gt_mask"), 35.5),
    "table6_roifi": (RCNN18, _only(feat="roifi"), 36.4),
    "table9_queue_8k": (RCNN18, _only(ckd=True), 36.8),
    "table9_queue_40k": (RCNN18, _only(ckd=True), 36.9),
    "table9_queue_120k": (RCNN18, _only(ckd=True), 37.0),
    "table9_queue_160k": (RCNN18, _only(ckd=True), 36.9),
    "table10_iou_0.1": (RCNN18, _only(ckd=True), 36.8),
    "table10_iou_0.3": (RCNN18, _only(ckd=True), 36.9),
    "table10_iou_0.7": (RCNN18, _only(ckd=True), 37.0),
    "table10_iou_0.9": (RCNN18, _only(ckd=True), 36.8),
    "table10_iou_1.0": (RCNN18, _only(ckd=True), 36.8),
    "table11_mlp": (RCNN18, _only(ckd=True), 36.7),
    "table13_gt_class": (RCNN18, _only(reg="gt_class"), 34.7),
    "table13_caware": (RCNN18, _only(reg=""), 35.7),
    "retinanet_r18_r50_1x": (RETINA18, DENSE, 36.3),
    "table2_retinanet_sgfi": (RETINA18, _dense(feat="sgfi"), 36.0),
    "table2_retinanet_ckd": (RETINA18, _dense(ckd=True), 35.8),
    "table2_retinanet_pred": (RETINA18, _dense(**PRED), 33.1),
    "table1_cls": (RETINA18, _dense(cls="max_norm"), 32.6),
    "table1_reg": (RETINA18, _dense(reg="l1"), 32.7),
    "table1_sgfi_pred": (RETINA18, _dense(feat="sgfi", **PRED), 36.1),
    "table6_retinanet_gt_mask": (RETINA18, _dense(feat="gt_mask"), 34.3),
    "table6_retinanet_roifi": (RETINA18, _dense(feat="roifi"), 35.5),
    "table12_loc": (RETINA18, _dense(ckd=True), 34.3),
    "table12_sum": (RETINA18, _dense(ckd=True), 35.1),
    "fcos_r18_r50_1x": (FCOS18, DENSE, 35.6),
    "table2_fcos_sgfi": (FCOS18, _dense(feat="sgfi"), 35.2),
    "table2_fcos_ckd": (FCOS18, _dense(ckd=True), 34.9),
    "table6_fcos_gt_mask": (FCOS18, _dense(feat="gt_mask"), 31.8),
    "table6_fcos_roifi": (FCOS18, _dense(feat="roifi"), 34.7),
    "table3_r50_r152_fgfi": (("RCNN", 50, "faster_rcnn_r152_2x"), "FGFI", 39.8),
    "table3_r50_r152_tadf": (("RCNN", 50, "faster_rcnn_r152_2x"), "TADF", 40.0),
    "table3_r50_r152_ckd": (("RCNN", 50, "faster_rcnn_r152_2x"), _only(ckd=True), 40.3),
    "table3_r50_r152": (("RCNN", 50, "faster_rcnn_r152_2x"), FULL, 41.0),
    "table3_r50_quarter_r50_fgfi": (("RCNN", 50, "faster_rcnn_r50_1x"), "FGFI", 31.7),
    "table3_r50_quarter_r50_ckd": (("RCNN", 50, "faster_rcnn_r50_1x"), _only(ckd=True), 32.4),
    "table3_r50_quarter_r50": (("RCNN", 50, "faster_rcnn_r50_1x"), FULL, 33.7),
    "table4_retinanet_r18_x101_2x": (("RetinaNet", 18, X101), DENSE, 38.5),
    "table4_retinanet_r50_x101_2x": (("RetinaNet", 50, X101), DENSE, 43.3),
    "table4_retinanet_r101_x101_2x": (("RetinaNet", 101, X101), DENSE, 44.6),
    "table4_fcos_r18_x101_2x": (("FCOS", 18, X101), DENSE, 38.6),
    "table4_fcos_r50_x101_2x": (("FCOS", 50, X101), DENSE, 43.1),
    "table4_fcos_r101_x101_2x": (("FCOS", 101, X101), DENSE, 44.6),
    "table4_faster_rcnn_r18_x101_2x": (("RCNN", 18, X101), FULL, 39.9),
    "table4_faster_rcnn_r50_x101_2x": (("RCNN", 50, X101), FULL, 44.0),
    "table4_faster_rcnn_r101_x101_2x": (("RCNN", 101, X101), FULL, 45.2),
    "table4_cascade_x101_x152_2x": (("Cascade", 101, X152), {**FULL, "transfer": False}, 50.1),
    "table5_cascade_x101_dcn_x152_2x": (("Cascade", 101, X152), {**FULL, "transfer": False}, 50.5),
    "table7_r50_r50": (("RCNN", 50, R50), FULL, 39.8),
    "table7_r101_r50": (("RCNN", 101, R50), FULL, 40.4),
    "table7_r50_r18": (("RCNN", 50, "faster_rcnn_r18_ms2x"), FULL, 37.7),
    "table7_r50_r101": (("RCNN", 50, "faster_rcnn_r101_3x"), FULL, 41.1),
    "table14_cascade_r18_r50": (("Cascade", 18, "cascade_mask_rcnn_r50_3x"), FULL, 40.4),
    "table14_cascade_r50_r50": (("Cascade", 50, "cascade_mask_rcnn_r50_3x"), FULL, 42.5),
    "table14_cascade_r101_r50": (("Cascade", 101, "cascade_mask_rcnn_r50_3x"), FULL, 43.3),
    "table14_c4_r18_r50": (("C4", 18, "faster_rcnn_r50_c4_1x"), {**FULL, "transfer": False}, 29.1),
    "table14_c4_r50_r50": (("C4", 50, "faster_rcnn_r50_c4_1x"), FULL, 34.7),
    "table14_c4_r101_r50": (("C4", 101, "faster_rcnn_r50_c4_1x"), FULL, 36.8),
}
# rows of Table 8: published values as the README has them
OTHER_DATA = {
    "VOC/faster_rcnn_r50_r101_0712": "83.0 / 69.7 / 20.6",
    "VOC/faster_rcnn_r101_r101_0712": "83.7 / 70.3 / 22.4",
    "VOC/faster_rcnn_r50_r101_07": "",
    "VOC/faster_rcnn_r101_r101_07": "",
    "BDD100K/faster_rcnn_r50_r101": "37.9 / 14.6 / 45.0 / 58.5",
    "BDD100K/faster_rcnn_r101_r101": "38.0 / 14.7 / 40.6 / 58.4",
}
# values besides the terms, by row
VALUES = {
    "table9_queue_8k": ("CKD.QUEUE_SIZE", 8 * 1024),
    "table9_queue_40k": ("CKD.QUEUE_SIZE", 40 * 1024),
    "table2_ckd": ("CKD.QUEUE_SIZE", 80 * 1024),
    "table9_queue_120k": ("CKD.QUEUE_SIZE", 120 * 1024),
    "table9_queue_160k": ("CKD.QUEUE_SIZE", 160 * 1024),
    **{f"table10_iou_{t}": ("CKD.IOU_THR", t) for t in (0.1, 0.3, 0.7, 0.9, 1.0)},
    "table11_mlp": ("CKD.PROJ", "mlp"),
    "table12_loc": ("CKD.DENSE_BRANCH", "loc"),
    "table12_sum": ("CKD.DENSE_BRANCH", "sum"),
}


def _lines(link):
    """Lines of the README's tables that show this config."""
    return [line for line in README.splitlines() if line.startswith("|") and f"({link})" in line]


# ------------------------------------------------------------------------------------- what is said
def test_every_recipe_is_a_row():
    assert {path.stem for path in (CONFIGS / "COCO").glob("*.yaml")} == set(ROWS)
    for folder in ("VOC", "BDD100K"):
        found = {f"{folder}/{p.stem}" for p in (CONFIGS / folder).glob("faster*.yaml")}
        assert found == {row for row in OTHER_DATA if row.startswith(folder)}


def test_readme_lists_every_config():
    paths = [
        p for f in ("COCO", "VOC", "BDD100K", "teachers") for p in (CONFIGS / f).glob("*.yaml")
    ]
    for path in paths:
        assert _lines(path.relative_to(PROJECT)), path


@pytest.mark.parametrize("row", [*ROWS, *OTHER_DATA])
def test_published_results(row):
    """The README's table and the comment of the config have the paper's number."""
    path = CONFIGS / (f"{row}.yaml" if "/" in row else f"COCO/{row}.yaml")
    published = OTHER_DATA[row] if row in OTHER_DATA else f"{ROWS[row][2]:.1f}"
    for line in _lines(path.relative_to(PROJECT)):
        assert published in line.partition(".yaml)")[2]
    comment = " ".join(x[2:] for x in path.read_text().splitlines() if x.startswith("# "))
    assert "Published AP" in comment
    if row in ROWS:
        assert re.search(rf"Published AP {re.escape(published)}\b", comment)


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    (student, depth, teacher), terms, _ = ROWS[row]
    cfg = build_config(str(CONFIGS / f"COCO/{row}.yaml"))
    model, node = cfg.MODEL, cfg.KD.GDETKD
    heads = {"StandardROIHeads": "RCNN", "CascadeROIHeads": "Cascade"}
    rcnn = heads.get(model.ROI_HEADS.NAME, "C4")
    two_stage = model.META_ARCHITECTURE == "GeneralizedRCNN"
    assert (rcnn if two_stage else model.META_ARCHITECTURE) == student
    assert model.RESNETS.DEPTH == depth and Path(cfg.KD.TEACHER.CONFIG_FILE).stem == teacher
    long = "_2x" in row
    assert cfg.SOLVER.MAX_ITER == (180_000 if long else 90_000)
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == ((640, 800) if long else (800,))
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == ("range" if long else "choice")
    assert model.BACKBONE.FREEZE_AT == 2 and model.RESNETS.NORM == "FrozenBN"
    widths = [width for part, width in {"quarter": 16, "cascade_x101": 4}.items() if part in row]
    assert [model.RESNETS.WIDTH_PER_GROUP] == (widths or [64])
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    if isinstance(terms, str):
        assert cfg.KD.DISTILLERS == (terms,)
        return
    assert cfg.KD.DISTILLERS == ("GDetKD",)
    actual = {"feat": node.FEAT.MODE, "ckd": node.CKD.ENABLED}
    if two_stage:
        actual.update(cls=node.CLS.WEIGHT != 0, reg=node.REG.MODE)
    else:
        actual.update(cls=node.HETERO_PRED.CLS, reg=node.HETERO_PRED.REG)
    actual["transfer"] = bool(cfg.KD.INIT_STUDENT.PREFIXES)
    assert actual == terms
    assert cfg.KD.INIT_STUDENT.FREEZE == terms["transfer"]
    # everything else is at its default
    key, value = VALUES.get(row, ("CKD.DIM", 128))
    assert functools.reduce(lambda n, k: n[k], key.split("."), node) == value
    assert (node.CKD.GAMMA, node.CKD.WEIGHT, node.FEAT.WEIGHT) == (0.07, 1.0, -1.0)


def test_c4_students_are_built_like_their_teacher():
    """What is transferred works in the student only with the stride at the same place."""
    for row in ("table14_c4_r50_r50", "table14_c4_r101_r50"):
        cfg = build_config(str(CONFIGS / f"COCO/{row}.yaml"))
        teacher = DetectorTeacher.load_config(cfg)
        assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 == teacher.MODEL.RESNETS.STRIDE_IN_1X1
        assert cfg.INPUT.FORMAT == teacher.INPUT.FORMAT == "BGR"


def test_readme_says_how_to_get_every_weight():
    """Each file below weights/ is the output of a command or is said to be brought by the user."""
    commands = [line for line in README.splitlines() if "convert_weights.py" in line]
    found = set()
    for path in CONFIGS.rglob("*.yaml"):
        found.update(re.findall(r'WEIGHTS: "(weights/[^"]+)"', path.read_text()))
    assert len(found) == 6
    for weights in found:
        made = [command for command in commands if command.endswith(f"--output {weights}")]
        assert len(made) == 1 or f"`{weights}`" in README, weights


# ----------------------------------------------------------------------------------------- training
# Detectors, heads and losses stay; backbones, widths and numbers of regions shrink.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.NUM_GROUPS", "1", "MODEL.RESNETS.WIDTH_PER_GROUP", "64"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
    *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, False]"),
    *("MODEL.FPN.OUT_CHANNELS", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "64", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "40"),
    *("MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FCOS.NUM_CONVS", "1"),
]
STUDENT = [
    *("KD.GDETKD.CKD.QUEUE_SIZE", "256", "KD.GDETKD.DENSE.NUM_SAMPLES", "16"),
    *("SOLVER.IMS_PER_BATCH", "2", "KD.TEACHER.WEIGHTS", "", "SEED", "3"),
    *("KD.TEACHER.ALLOW_UNTRAINED", "True", "SOLVER.BASE_LR", "1e-6"),
]


@functools.lru_cache(maxsize=None)
def _config(name):
    # the teacher's mask head does not teach
    teacher = repr((*SMALL, "MODEL.MASK_ON", "False"))
    return build_config(
        str(CONFIGS / f"{name}.yaml"), [*SMALL, *STUDENT, "KD.TEACHER.OPTS", teacher]
    )


def _distinct():
    """One of the recipes that are equal once they are small."""
    found = {}
    for name in [*(f"COCO/{row}" for row in ROWS), *OTHER_DATA]:
        cfg = _config(name).clone()
        cfg.defrost()
        teacher = Path(cfg.KD.TEACHER.CONFIG_FILE).stem
        cfg.KD.TEACHER.CONFIG_FILE = "".join(x for x in ("cascade", "c4") if x in teacher)
        cfg.KD.GDETKD.CKD.IOU_THR = 0.5
        found.setdefault((cfg.MODEL.dump(), cfg.KD.dump()), name)
    return sorted(found.values())


@pytest.mark.parametrize("name", _distinct())
def test_recipe_takes_two_steps(name):
    cfg = _config(name)
    seed_all_rng(1)
    trainer_model = KDTrainer.build_model(cfg).train()
    optimizer = build_optimizer(cfg, trainer_model)
    student = trainer_model.student
    before = {k: v.clone() for k, v in student.state_dict().items()}
    teacher = {k: v.clone() for k, v in trainer_model.teacher.model.state_dict().items()}
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    # the anchors of a RetinaNet are too large for smaller images to have foreground boxes
    small = cfg.MODEL.META_ARCHITECTURE != "RetinaNet"
    sizes = ((64, 96), (64, 64)) if small else ((128, 128), (96, 112))
    with EventStorage(0) as storage:
        for step in range(2):
            batch = tiny_batch(sizes=sizes, num_classes=classes, seed=step)
            losses = trainer_model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
            assert all(math.isfinite(value) for value in losses.values()), losses
    terms = {k.rsplit("/")[-1]: value.item() for k, value in losses.items() if "loss_kd" in k}
    expected = _expected_terms(cfg)
    assert set(terms) == expected
    # an FCOS predicts no foreground boxes in its first steps
    empty = {"feat"} if cfg.MODEL.META_ARCHITECTURE == "FCOS" else set()
    assert all(value > 0 for term, value in terms.items() if term not in empty), terms

    after = student.state_dict()
    frozen = tuple(cfg.KD.INIT_STUDENT.PREFIXES)
    for key, value in before.items():
        if frozen and key.startswith(frozen):
            assert torch.equal(after[key], value), key
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert any(key.startswith("backbone") for key in moved)
    for key, value in trainer_model.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[key]), key


def _expected_terms(cfg):
    if cfg.KD.DISTILLERS != ("GDetKD",):
        return {"feat"}
    node = cfg.KD.GDETKD
    dense = cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
    on = {
        "feat": node.FEAT.MODE != "none",
        "ckd": node.CKD.ENABLED,
        "cls": node.HETERO_PRED.CLS != "off" if dense else node.CLS.WEIGHT != 0,
        "reg": node.HETERO_PRED.REG != "off" if dense else node.REG.MODE != "off",
    }
    return {term for term, yes in on.items() if yes}
