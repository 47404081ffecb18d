"""Head transfer of two-stage detectors: KD.INIT_STUDENT with the whole head, frozen."""

import pytest
import torch
from detectron2.modeling import build_model

from kd_d2.distillation import build_tap
from kd_d2.engine import KDTrainer
from kd_d2.engine.init_student import (
    check_inheritance,
    copy_from_teacher,
    freeze_prefixes,
    inherited_names,
)
from tests.engine.support import StopAt, teacher_keys, train
from tests.fixtures import registered_toy_dataset, save_weights, tiny_cfg, tiny_model

HEAD = ("proposal_generator.rpn_head", "roi_heads")
R50 = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256}
# a box head with running statistics
WITH_NORM = {
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.NORM": "BN",
}


@pytest.fixture
def pair(tmp_path):
    """A function (family, shared keys, student's, teacher's) -> (config, teacher's weights)."""

    def make(family="GeneralizedRCNN", both=None, student=None, teacher=None, other=""):
        both = both or {}
        keys = teacher_keys(tmp_path, other or family, **{**both, **(teacher or {})})
        state = torch.load(keys["KD.TEACHER.WEIGHTS"])
        for name in state["model"]:
            if name.endswith("running_mean"):
                state["model"][name] += 0.25
        torch.save(state, keys["KD.TEACHER.WEIGHTS"])
        changes = {
            **both,
            **(student or {}),
            **keys,
            "DATASETS.TRAIN": (name_of_data,),
            "OUTPUT_DIR": str(tmp_path / "output"),
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "SOLVER.MAX_ITER": 4,
            "SOLVER.WEIGHT_DECAY": 0.1,
            "SOLVER.BASE_LR": 0.01,
            "INPUT.MIN_SIZE_TRAIN": (64,),
            "KD.ENABLED": True,
            "KD.DISTILLERS": ("PKD",),
            "KD.INIT_STUDENT.PREFIXES": HEAD,
            "KD.INIT_STUDENT.FREEZE": True,
        }
        return tiny_cfg(family, **changes), state["model"]

    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name_of_data:
        yield make


def check(student, teacher, prefixes=HEAD):
    """What the trainer checks when it builds both networks."""
    networks = (student, teacher)
    keys = [build_tap(network).keys(network) for network in networks]
    states = (network.state_dict() for network in networks)
    check_inheritance(prefixes, *states, *keys, networks)


def test_r18_from_r50_stays_bit_by_bit_over_steps_and_resume(pair):
    cfg, teacher = pair(both=WITH_NORM, teacher=R50)
    before = {}

    def started(trainer):
        before.update({k: v.clone() for k, v in trainer.student.state_dict().items()})

    trainer = train(cfg, hooks=[StopAt(2)], started=started)
    student = trainer.student
    parameters = dict(student.named_parameters())
    head = inherited_names(parameters, HEAD)
    # 14 of two fully connected layers, 3 of the convolution with its norm
    assert len(head) == 17 and sum("conv1" not in name for name in head) == 14
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(parameters[name]) for name in head}
    assert {id(p) for n, p in parameters.items() if n not in head} <= optimised
    state = student.state_dict()
    buffers = [n for n in inherited_names(state, HEAD) if n not in parameters]
    assert len(buffers) == 3  # mean, variance, number of batches
    for name in head + buffers:
        assert torch.equal(state[name], teacher[name]), name
    # with weight decay every other one moves, and the gradient came through the frozen head
    still = [n for n in parameters if n not in head and torch.equal(parameters[n], before[n])]
    assert still == []
    assert parameters["backbone.bottom_up.res2.0.conv1.weight"].grad.abs().sum() > 0

    def resumed(trainer):
        assert trainer.start_iter == 2
        for name in head + buffers:
            assert torch.equal(trainer.student.state_dict()[name], teacher[name]), name

    trainer = train(cfg, resume=True, started=resumed)
    assert trainer.iter == cfg.SOLVER.MAX_ITER
    for name in head + buffers:
        assert torch.equal(trainer.student.state_dict()[name], teacher[name]), name


def test_resume_with_another_teacher_is_refused(pair, tmp_path):
    cfg, teacher = pair()
    train(cfg, hooks=[StopAt(2)])
    name = "roi_heads.box_predictor.bbox_pred.bias"
    other = tiny_model("GeneralizedRCNN")
    teacher[name][3] += 1e-6
    other.load_state_dict(teacher)
    save_weights(other, cfg.KD.TEACHER.WEIGHTS, classes=("disc", "square", "cross"))
    with pytest.raises(ValueError, match=f"are not the teacher's: {name}. The checkpoint"):
        KDTrainer(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize(
    "family, changes, parameters, buffers",
    [
        ("GeneralizedRCNN", {}, 14, 0),
        ("Cascade", {}, 30, 0),
        ("C4", R50, 20, 40),
        ("C4", {}, 20, 40),  # Detectron2's own R-18: a bottleneck stage
    ],
)
def test_tensors_of_each_head(family, changes, parameters, buffers):
    student, teacher = (tiny_model(family, seed=seed, **changes) for seed in (0, 5))
    for value in teacher.state_dict().values():  # biases as well are not those of the student
        value.add_(0.5)
    check(student, teacher)
    freezing = {"KD.ENABLED": True, "KD.INIT_STUDENT.PREFIXES": HEAD}
    freeze_prefixes(tiny_cfg(family, **freezing, **{"KD.INIT_STUDENT.FREEZE": True}), student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copy_from_teacher(student, teacher.state_dict(), HEAD)
    own, state, theirs = (
        dict(student.named_parameters()),
        student.state_dict(),
        teacher.state_dict(),
    )
    frozen = [name for name, p in own.items() if not p.requires_grad]
    same = [name for name in state if torch.equal(state[name], theirs[name])]
    changed = [name for name in state if not torch.equal(state[name], before[name])]
    assert len(frozen) == parameters and set(frozen) <= set(same)
    assert len([name for name in same if name not in own]) == buffers
    assert set(changed) <= set(same) and all(name.startswith(HEAD) for name in same)


def test_size_of_the_head_on_coco():
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.MODEL.FPN.OUT_CHANNELS = 256
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    parameters = dict(build_model(cfg).named_parameters())
    head = inherited_names(parameters, HEAD)
    assert len(head) == 14
    assert sum(parameters[name].numel() for name in head) == 14_900_640


SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
OTHERS = [
    ({SIZES: [[16], [32], [64], [96], [120]]}, r"anchor cells \(RPN\)"),
    ({"MODEL.RPN.BBOX_REG_WEIGHTS": (2.0, 2.0, 1.0, 1.0)}, "weights of the RPN.*student.*2.0, 2.0"),
    ({"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (5.0, 5.0, 5.0, 5.0)}, "box weights of the RoI head"),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign"}, "'ROIAlign'.*'ROIAlignV2'"),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}, "pooler.*'RoIPool'"),
]


@pytest.mark.parametrize("student, words", OTHERS)
def test_what_shapes_do_not_tell(student, words):
    with pytest.raises(ValueError, match=words) as caught:
        check(tiny_model("GeneralizedRCNN", **student), tiny_model("GeneralizedRCNN"))
    assert str(caught.value).count("\n- ") == 1


def test_shapes_and_facts_together(pair):
    cfg, _ = pair(
        student={
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
            "MODEL.RPN.BBOX_REG_WEIGHTS": (2.0, 2.0, 1.0, 1.0),
        }
    )
    with pytest.raises(ValueError) as caught:
        KDTrainer(cfg)
    message = str(caught.value)
    assert "'roi_heads.box_head.fc1.weight' has shape (48, 1568) in the student" in message
    assert "(7, 7, 'ROIAlignV2')" in message and "box weights of the RPN" in message
    assert message.count("\n- ") == 3


def test_number_of_classes():
    networks = [tiny_model("GeneralizedRCNN", **{"MODEL.ROI_HEADS.NUM_CLASSES": k}) for k in (3, 4)]
    with pytest.raises(ValueError, match=r"number of classes, .*student \(4,\), teacher \(5,\)"):
        check(*networks, ("roi_heads.box_head",))
    # the backbone may be copied all the same
    check(*networks, ("backbone.",))


def test_later_stages_of_cascades_count():
    weights = "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
    values = [[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]]
    other = [*values[:2], [40, 40, 15, 15]]
    networks = [tiny_model("Cascade", **{weights: v}) for v in (values, other)]
    with pytest.raises(ValueError, match="of stage 2 ") as caught:
        check(*networks)
    assert str(caught.value).count("\n- ") == 1


def test_dense_student_is_told_to_drop_the_prefixes(pair):
    cfg, _ = pair("RetinaNet", other="GeneralizedRCNN")
    with pytest.raises(ValueError, match="(?s)student starts with 'roi_heads'.*drop the prefixes"):
        KDTrainer(cfg)


def test_c4_of_another_width_is_told_to_drop_the_prefixes():
    with pytest.raises(ValueError, match="drop the prefixes") as caught:
        check(tiny_model("C4"), tiny_model("C4", **R50))
    assert (
        "rpn_head.conv.weight' has shape (256, 256, 3, 3) in the student and (1024, 1024, 3, 3)"
        in str(caught.value)
    )


def test_strides_that_shapes_do_not_tell():
    networks = [
        tiny_model("C4", **{**R50, "MODEL.RESNETS.STRIDE_IN_1X1": first}) for first in (False, True)
    ]
    with pytest.raises(ValueError, match=r"STRIDE_IN_1X1") as caught:
        check(*networks)
    # the stride of res5's first block is in its 3x3 convolution or in the 1x1 before it
    assert "'roi_heads.res5.0.conv1' has stride (1, 1) in the student and (2, 2)" in str(
        caught.value
    )
    assert "'roi_heads.res5.0.conv2' has stride (2, 2) in the student and (1, 1)" in str(
        caught.value
    )
    assert str(caught.value).count("\n- ") == 2


def test_mask_heads_are_copied_only_on_request():
    names = ["roi_heads.box_head.fc1.weight", "roi_heads.mask_head.deconv.weight"]
    assert inherited_names(names, ("roi_heads",)) == names[:1]
    assert inherited_names(names, ("roi_heads.mask_head", "roi_heads.box_head")) == names
    head = {"MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead"}
    student, teacher = tiny_model("GeneralizedRCNN"), tiny_model("GeneralizedRCNN", **head)
    check(student, teacher)
    with pytest.raises(ValueError, match="student starts with 'roi_heads.mask_head'"):
        check(student, teacher, ("roi_heads.mask_head",))
