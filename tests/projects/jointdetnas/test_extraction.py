"""Stand-alone subnets: equal to the active one, recalibrated, always on the same images."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_d2.projects.jointdetnas.extraction import (
    CalibrationBatches,
    as_subnet,
    extract,
    recalibrate,
    subnet_config,
)
from kd_d2.projects.jointdetnas.subnet import Subnet
from tests.fixtures import registered_toy_dataset, tiny_batch
from tests.projects.jointdetnas.elastic_cases import (
    assert_same_outputs,
    codes,
    elastic_cfg,
    image,
    outputs,
    supernet,
)


@pytest.mark.parametrize("norm", ["BN", ""])
def test_extracted_model_equals_the_active_subnet(norm):
    """30 random codes, the smallest and the largest, all parts of the network."""
    cfg, net = supernet(norm)
    x = image(size=(64, 128))
    for subnet in codes(cfg, 30 if norm else 4):
        net.set_active(subnet)
        _, model = extract(cfg, net.model, subnet)
        assert_same_outputs(outputs(model, x), outputs(net.model, x), rtol=1e-5)


def test_detections_are_equal():
    cfg, net = supernet(**{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0})
    batch = tiny_batch(sizes=((64, 96), (97, 70)))
    for subnet in codes(cfg, 3):
        net.set_active(subnet)
        sub_cfg, model = extract(cfg, net.model, subnet)
        assert type(model.backbone.bottom_up).__name__ == "MorphResNet"
        with torch.no_grad():
            for a, b in zip(model(batch), net.model(batch)):
                a, b = a["instances"], b["instances"]
                assert len(a) == len(b) > 0
                torch.testing.assert_close(
                    a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3
                )
                torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
                assert torch.equal(a.pred_classes, b.pred_classes)


def test_extraction_leaves_the_supernet_and_random_numbers_alone():
    cfg, net = supernet()
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    state = torch.get_rng_state()
    _, model = extract(cfg, net.model, codes(cfg, 1)[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert net.active == net.geometry.largest and not model.training
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()  # nothing is shared
    assert all(torch.equal(before[k], v) for k, v in net.model.state_dict().items())


def test_config_of_a_subnet_by_hand():
    cfg = elastic_cfg(
        **{"KD.ENABLED": True, "MODEL.WEIGHTS": "pool.pth", "KD.DISTILLERS": ("PKD",)}
    )
    sub = subnet_config(cfg, Subnet((1, 2, 2, 1), (4, 5, 6, 4), 5, 6))
    assert sub.MODEL.MORPH_RESNET.ENCODING == (
        "[(8,8,32)],[(20,20,80)-(20,20,80)],[(48,48,192)-(48,48,192)],[(64,64,256)]"
    )
    assert sub.MODEL.RESNETS.STEM_OUT_CHANNELS == 12 and sub.MODEL.FPN.OUT_CHANNELS == 40
    assert (sub.MODEL.RESNETS.NORM, sub.MODEL.FPN.NORM) == ("BN", "BN")
    assert not sub.KD.ENABLED and sub.KD.DISTILLERS == () and sub.MODEL.WEIGHTS == ""
    assert sub.MODEL.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead"
    assert cfg.MODEL.BACKBONE.NAME == "build_elastic_resnet_fpn_backbone" and cfg.KD.ENABLED
    without = subnet_config(elastic_cfg(**{"MODEL.FPN.NORM": ""}), Subnet((1,) * 4, (4,) * 4, 4, 4))
    assert without.MODEL.FPN.NORM == ""


def test_names_of_subnets():
    cfg = elastic_cfg(**{"MODEL.ELASTIC_RESNET.WIDTHS": (4, 5)})
    assert str(as_subnet("largest", cfg)) == "d2-2-3-2_w5-5-5-5_n5_s5"
    assert str(as_subnet("smallest", cfg)) == "d1-1-1-1_w4-4-4-4_n4_s4"
    # any part of the supernet, drawn or not
    assert str(as_subnet("d2-2-3-2_w6-6-6-6_n6_s6", cfg)) == "d2-2-3-2_w6-6-6-6_n6_s6"
    with pytest.raises(ValueError, match="no part of the supernet"):
        as_subnet("d2-2-4-2_w6-6-6-6_n6_s6", cfg)


# ------------------------------------------------------------------------------ recalibration
def naive_statistics(model, batches):
    """Statistics by a loop over the images: the plain convs, and the moments by numpy.

    Fixed weights, batch statistics while it goes on, as in training.
    """
    sums = {}

    def hook(norm, inputs, _):
        x = inputs[0].double().transpose(0, 1).flatten(1).numpy()
        total = sums.setdefault(norm, [0, 0.0, 0.0])
        total[0] += x.shape[1]
        total[1] += x.sum(axis=1)
        total[2] += (x * x).sum(axis=1)

    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(hook) for norm in norms]
    copies = {k: v.clone() for k, v in model.state_dict().items()}
    model.backbone.train()
    with torch.no_grad():
        for batch in batches:
            model.backbone(model.preprocess_image(batch).tensor)
    for handle in handles:
        handle.remove()
    model.load_state_dict(copies)
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    return {
        names[norm]: (total / n, squares / n - (total / n) ** 2)
        for norm, (n, total, squares) in sums.items()
    }


def batches_of(number, images=2):
    sizes = ((64, 96), (96, 64), (48, 64))
    return [tiny_batch(images, sizes=(sizes[i % 3],), seed=i) for i in range(number)]


def test_statistics_are_those_of_all_pixels():
    cfg, net = supernet()
    _, model = extract(cfg, net.model, codes(cfg, 1)[2])
    batches = batches_of(3)
    expected = naive_statistics(model, batches)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert recalibrate(model, batches) == 3
    modules = dict(model.named_modules())
    assert len(expected) == sum(isinstance(m, nn.BatchNorm2d) for m in modules.values())
    for name, (mean, variance) in expected.items():
        norm = modules[name]
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-3, atol=1e-4)
    for name, value in model.state_dict().items():
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert statistic or torch.equal(value, before[name]), name
    assert not any(module.training for module in model.modules())
    again = {k: v.clone() for k, v in model.state_dict().items() if "tracked" not in k}
    recalibrate(model, batches)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in again.items())


def test_on_one_batch_evaluation_is_training():
    cfg, net = supernet()
    _, model = extract(cfg, net.model, codes(cfg, 1)[2])
    model.double()  # the coarsest level has 12 cells
    (batch,) = batches_of(1)
    recalibrate(model, [batch])
    x = model.preprocess_image(batch).tensor
    with torch.no_grad():
        evaluated = model.backbone(x)
        trained = model.backbone.train()(x)
    for name, value in evaluated.items():
        scale = trained[name].abs().max()
        assert (value - trained[name]).abs().max() <= 1e-5 * scale, name


def test_recalibration_repairs_a_subnet():
    """A subnet with the statistics of another network, against one with its own."""
    cfg, net = supernet()
    subnet = codes(cfg, 1)[2]
    _, model = extract(cfg, net.model, subnet)
    batches = batches_of(3)
    recalibrate(model, batches)
    x = model.preprocess_image(tiny_batch(sizes=((64, 96),), seed=50)).tensor
    with torch.no_grad():
        good = model.backbone(x)["p2"]
        for module in net.model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(1)
                module.running_var.mul_(4)
        _, broken = extract(cfg, net.model, subnet)
        bad = broken.backbone(x)["p2"]
        recalibrate(broken, batches)
        mended = broken.backbone(x)["p2"]
    assert (bad - good).abs().mean() > 0.5 * good.abs().mean()
    torch.testing.assert_close(mended, good)


def test_recalibration_without_images_and_norms():
    cfg, net = supernet()
    _, model = extract(cfg, net.model, codes(cfg, 0)[0])
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(model, [])
    model.backbone.train()
    recalibrate(model, iter(batches_of(2)))
    # the mode is what it was
    assert model.backbone.training and not model.training


# --------------------------------------------------------------------------------- the images
def test_calibration_batches_are_always_the_same(tmp_path):
    with registered_toy_dataset(tmp_path, 7, size=(60, 80)) as name:
        keys = {"BATCHES": 3, "IMAGES": 2, "SEED": 0}
        node = {f"MODEL.ELASTIC_RESNET.RECALIBRATION.{k}": v for k, v in keys.items()}
        cfg = elastic_cfg(**{"DATASETS.TRAIN": (name,), "INPUT.RANDOM_FLIP": "horizontal"}, **node)
        batches = CalibrationBatches(cfg)
        assert len(batches) == 3
        first, second = list(batches), list(batches)
        for a, b in zip(first, second):
            assert [x["file_name"] for x in a] == [x["file_name"] for x in b]
            assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b))
        # resolutions in turn: 96x64, 128x96, 96x64 of images of 80x60
        sizes = [[tuple(x["image"].shape[1:]) for x in batch] for batch in first]
        assert sizes == [[(64, 85)] * 2, [(96, 128)] * 2, [(64, 85)] * 2]
        names = [x["file_name"] for batch in first for x in batch]
        assert len(set(names)) == 6
        cfg.MODEL.ELASTIC_RESNET.RECALIBRATION.SEED = 1
        others = [x["file_name"] for batch in CalibrationBatches(cfg) for x in batch]
        assert others != names
        # more than there are images: they come again
        cfg.MODEL.ELASTIC_RESNET.RECALIBRATION.BATCHES = 4
        again = [x["file_name"] for batch in CalibrationBatches(cfg) for x in batch]
        assert len(set(again)) == 7 and again[7] == again[0]


@pytest.mark.parametrize("key", ["BATCHES", "IMAGES"])
def test_impossible_numbers_of_images_name_their_key(key):
    cfg = elastic_cfg(**{f"MODEL.ELASTIC_RESNET.RECALIBRATION.{key}": 0})
    with pytest.raises(ValueError, match=f"RECALIBRATION.{key}"):
        CalibrationBatches(cfg)
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        CalibrationBatches(elastic_cfg())
