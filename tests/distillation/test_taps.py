"""Keys, the registry of taps, and staged runs, on whatever family shows the behaviour best."""

import pytest
import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.distillation import KD_TAPS, Assignment, Key, KeyInfo, build_tap
from kd_d2.distillation.dense_tap import DenseTap
from kd_d2.distillation.rcnn_tap import RCNNTap
from tests.fixtures import FAMILIES, TWO_STAGE
from tests.fixtures import tiny_batch as _any_batch
from tests.fixtures import tiny_model


def tiny_batch(**kwargs):
    return _any_batch(**{"sizes": [(64, 64), (48, 60)], **kwargs})


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("backbone.res4", ("backbone", "res4", None, False)),
        ("neck", ("neck", "", None, False)),
        ("neck.p3", ("neck", "p3", None, False)),
        ("head.cls[0]", ("head", "cls", 0, False)),
        ("head.box[12]:pre", ("head", "box", 12, True)),
        ("proposals[2]", ("proposals", "", 2, False)),
        ("roi.cls[1]", ("roi", "cls", 1, False)),
        ("path:head.cls_subnet.0", ("path", "head.cls_subnet.0", None, False)),
    ],
)
def test_keys_are_parsed(text, parsed):
    assert tuple(Key.parse(text)) == parsed


@pytest.mark.parametrize("text", ["", "head.cls[x]", "head.cls[1", "neck/p3", "a.b.c", "Neck"])
def test_what_is_no_key_is_refused(text):
    with pytest.raises(ValueError, match="is not a key; expected e.g."):
        Key.parse(text)


def test_assignment_masks():
    labels = torch.tensor([[0, 2, 3, -1], [3, 1, -1, 3]])  # K = 3 is background
    assignment = Assignment(labels, torch.zeros(2, 4, 4), num_classes=3)
    assert assignment.positive.tolist() == [
        [True, True, False, False],
        [False, True, False, False],
    ]
    assert assignment.valid.tolist() == [[True, True, True, False], [True, True, False, True]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_detector_finds_the_tap_of_its_family(family):
    expected = RCNNTap if family in TWO_STAGE else DenseTap
    assert type(build_tap(tiny_model(family))) is expected


def test_unknown_meta_architecture_lists_the_known_families():
    class Transformer(nn.Module):
        pass

    with pytest.raises(ValueError, match="Transformer.*DenseDetector, GeneralizedRCNN"):
        build_tap(Transformer())


class _Widened(RetinaNet):
    """A detector of a user, derived from a known one."""


@pytest.fixture
def widened():
    """A tiny RetinaNet turned into the user's class."""
    model = tiny_model("RetinaNet")
    model.__class__ = _Widened
    return model


def test_subclasses_use_the_tap_of_their_base(widened):
    assert type(build_tap(widened)) is DenseTap


def test_a_user_registers_a_tap_for_a_subclass(widened):
    @KD_TAPS.register_for(_Widened)
    class SquaredTap(DenseTap):
        """Adds one key: the mean square of each level."""

        def keys(self, model):
            strides = super().keys(model)["neck"].strides
            return {**super().keys(model), "energy": KeyInfo(1, strides)}

        def paths(self, model, keys):
            keys = list(keys)
            extra = {"backbone"} if any(key.group == "energy" for key in keys) else set()
            return extra | super().paths(model, keys)

        def _read_energy(self, store, key):
            return [(x**2).mean(dim=1) for x in self._pyramid(store)]

    try:
        tap = build_tap(widened)
        assert type(tap) is SquaredTap
        assert type(build_tap(tiny_model("RetinaNet"))) is DenseTap
        with EventStorage(), tap.observe(widened, ["energy"]) as observation:
            widened(tiny_batch())
        with torch.no_grad():
            images = widened.preprocess_image(tiny_batch()).tensor
            features = widened.backbone(images)
            expected = [(features[name] ** 2).sum(dim=1) / 32 for name in widened.head_in_features]
        for got, want in zip(observation["energy"], expected):
            torch.testing.assert_close(got, want)
        with pytest.raises(AssertionError, match="already registered"):
            KD_TAPS.register_for(_Widened)(DenseTap)
    finally:
        KD_TAPS._obj_map.pop("_Widened")


def test_unknown_key_names_similar_ones():
    model = tiny_model("GFL")
    tap = build_tap(model)
    with pytest.raises(ValueError, match=r"GFL has no key 'head.cls\[3\]'; similar: .*head.cls\["):
        tap.observe(model, ["neck", "head.cls[3]"])
    with pytest.raises(ValueError, match="GFL has no key 'pred.ctr'.*pred.cls"):
        tap.run(model, torch.zeros(1, 3, 64, 64), ["pred.ctr"])
    with pytest.raises(ValueError, match="no module 'head.cls_subnets'.*head.cls_subnet"):
        tap.observe(model, ["path:head.cls_subnets"])


def test_reading_what_was_not_observed_is_an_error():
    model = tiny_model("GFL")
    with EventStorage(), build_tap(model).observe(model, ["neck"]) as observation:
        model(tiny_batch())
    with pytest.raises(ValueError, match="module 'head' is not recorded; recorded: backbone"):
        observation["pred.cls"]


def test_values_are_cached_until_the_next_forward():
    model = tiny_model("RetinaNet")
    observation = build_tap(model).observe(model, ["neck", "anchors"])
    with EventStorage():
        with observation:
            model(tiny_batch())
        first = observation["anchors"], observation["neck"][0]
        assert observation["anchors"] is first[0]
        with observation:
            model(tiny_batch(sizes=[(96, 90)]))
    assert first[1].shape[-2:] == (8, 8) and observation["neck"][0].shape[-2:] == (12, 12)
    assert len(first[0][0]) == 8 * 8 * 4 and len(observation["anchors"][0]) == 12 * 12 * 4


def _images(model):
    return model.preprocess_image(tiny_batch()).tensor


def _count_calls(model, paths):
    counts = dict.fromkeys(paths, 0)
    modules = dict(model.named_modules())

    def counter(path):
        def count(*_):
            counts[path] += 1

        return count

    for path in paths:
        modules[path].register_forward_hook(counter(path))
    return counts


def test_staged_run_executes_only_what_is_read_and_once():
    model = tiny_model("RetinaNet").eval()
    tap = build_tap(model)
    counts = _count_calls(model, ["backbone", "head"])
    run = tap.run(model, _images(model), ["neck", "backbone.res4", "head.cls[1]", "pred.cls"])
    assert counts == {"backbone": 0, "head": 0}
    run["neck"], run["neck.p4"], run["backbone.res4"], run["head.cls[0]"]
    assert counts == {"backbone": 1, "head": 0}
    run["pred.cls"], run["head.cls[1]"], run["pred.box"], run["neck"]
    assert counts == {"backbone": 1, "head": 1}
    run = tap.run(model, _images(model), ["pred.cls", "anchors"])
    run["pred.cls"], run["anchors"]
    assert counts == {"backbone": 2, "head": 2}


def test_staged_run_of_a_two_stage_detector_executes_only_what_is_read_and_once():
    model = tiny_model("GeneralizedRCNN").eval()
    tap = build_tap(model)
    parts = ["backbone", "proposal_generator.rpn_head", "roi_heads.box_pooler"]
    heads = ["roi_heads.box_head", "roi_heads.box_predictor"]
    counts = _count_calls(model, parts + heads)
    boxes = [x["instances"].gt_boxes for x in tiny_batch()]
    run = tap.run(model, _images(model), ["neck.p3", "rpn.obj", "roi.feat", "roi.cls"])
    run["neck.p3"]
    assert list(counts.values()) == [1, 0, 0, 0, 0]
    run.run_rois(["roi.feat"], boxes)
    assert list(counts.values()) == [1, 0, 1, 0, 0]
    run["rpn.obj"], run["rpn.box"]
    assert list(counts.values()) == [1, 1, 1, 0, 0]
    embed = run.run_rois(["roi.embed"], boxes)["roi.embed"]
    assert list(counts.values()) == [1, 1, 2, 1, 0]
    # same boxes, keys that are known by now: shared
    assert run.run_rois(["roi.embed", "roi.feat"], boxes)["roi.embed"] is embed
    assert list(counts.values()) == [1, 1, 2, 1, 0]
    run.run_rois(["roi.cls"], boxes)
    run.run_rois(["roi.box", "roi.embed"], boxes)
    assert counts["roi_heads.box_predictor"] == 1
    other = run.run_rois(["roi.cls"], [b.clone() for b in boxes])
    assert counts["roi_heads.box_predictor"] == 2 and counts["backbone"] == 1
    assert torch.equal(other["roi.cls"], run.run_rois(["roi.cls"], boxes)["roi.cls"])


def test_a_later_pass_on_the_same_boxes_keeps_what_is_known():
    model = tiny_model("Cascade").eval()
    counts = _count_calls(model, [f"roi_heads.box_predictor.{stage}" for stage in range(3)])
    boxes = [x["instances"].gt_boxes for x in tiny_batch()]
    run = build_tap(model).run(model, _images(model), ["roi.cls", "roi.cls[2]"])
    first = run.run_rois(["roi.cls"], boxes)["roi.cls"]
    run.run_rois(["roi.cls[2]"], boxes)
    before = list(counts.values())
    both = run.run_rois(["roi.cls", "roi.cls[2]"], boxes)
    assert list(counts.values()) == before and before[1:] == [0, 1]
    assert torch.equal(both["roi.cls"], first)


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS", "GeneralizedRCNN", "Cascade", "C4"])
def test_staged_run_writes_no_scalars_makes_no_graph_and_never_calls_forward(family, monkeypatch):
    model = tiny_model(family)  # in training mode with gradients: the hardest case

    def forward(*_):
        raise AssertionError("the model's own forward was called")

    monkeypatch.setattr(model, "forward", forward)
    tap = build_tap(model)
    gt_instances = [x["instances"] for x in tiny_batch()]
    boxes = [gt.gt_boxes for gt in gt_instances]
    readable = [k for k in tap.keys(model) if not k.startswith(("roi", "proposals"))]
    with EventStorage() as storage:
        run = tap.run(model, _images(model), list(tap.keys(model)), gt_instances)
        values = [run[key] for key in readable]
        if family in TWO_STAGE:
            rois = [key for key in tap.keys(model) if key.startswith("roi")]
            values.append(list(run.run_rois(rois, boxes).values()))
    assert storage.latest() == {} and storage.histories() == {}
    tensors = [t for value in values for t in (value if isinstance(value, list) else [value])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert len(tensors) > 5
    assert not any(t.requires_grad or t.grad_fn for t in tensors)
    assert torch.is_grad_enabled()


def test_staged_run_works_outside_of_an_event_storage():
    model = tiny_model("RetinaNet").eval()
    run = build_tap(model).run(model, _images(model), ["pred.cls"])
    assert len(run["pred.cls"]) == 5


def test_roi_passes_of_dense_detectors_are_refused():
    model = tiny_model("RetinaNet").eval()
    run = build_tap(model).run(model, _images(model), ["neck"])
    with pytest.raises(ValueError, match="RetinaNet has no RoI head"):
        run.run_rois(["roi.cls"], [x["instances"].gt_boxes for x in tiny_batch()])


def test_modules_behind_the_sampling_cannot_be_staged():
    model = tiny_model("GeneralizedRCNN").eval()
    run = build_tap(model).run(model, _images(model), ["path:roi_heads.box_head"])
    with pytest.raises(ValueError, match="roi_heads.box_head.*runs on given boxes only"):
        run["path:roi_heads.box_head"]


def test_rest_of_head_of_two_stage_detectors_is_refused():
    model = tiny_model("GeneralizedRCNN")
    with pytest.raises(ValueError, match="GeneralizedRCNN has no dense head"):
        build_tap(model).rest_of_head(model, "cls", 0, [])
