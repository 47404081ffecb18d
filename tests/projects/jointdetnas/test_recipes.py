"""The recipes of Tables 11 and 12 differ in what teaches alone; X101's weights can be had."""

from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.resnet import Bottleneck

from kd_d2.engine.main import build_config
from kd_d2.modeling.convert import convert_torchvision
from kd_d2.projects.jointdetnas import MorphResNet, resolve
from tests.projects.jointdetnas.cases import images, randomise_norms

PROJECT = Path(__file__).parents[3] / "projects/JointDetNAS"
README = (PROJECT / "README.md").read_text()

# Table 11 and the first rows of Table 12: distillers, published AP
ROWS = {
    "table11_baseline": ((), 34.0),
    "table11_whole_feature": (("FitNets",), 35.2),
    "table11_anchor_mask": (("FGFI",), 35.6),
    "table11_gaussian_mask": (("TADF",), 35.4),
    "table12_r50": ((), 37.4),
    "table12_feat": (("JointDetNAS",), 36.7),
}


def _config(name):
    return build_config(str(PROJECT / f"configs/COCO/{name}.yaml"))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_table_11(name):
    cfg, reference = _config(name), _config("table12_all")
    distillers, ap = ROWS[name]
    assert (tuple(cfg.KD.DISTILLERS) if cfg.KD.ENABLED else ()) == distillers
    # 12 epochs of the same data with the same solver
    for node in ("SOLVER", "INPUT", "DATASETS"):
        assert cfg[node] == reference[node], node
    assert cfg.SOLVER.MAX_ITER == 90000 and cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    base = "r50" if name == "table12_r50" else "r18"
    assert cfg.MODEL.MORPH_RESNET.ENCODING == str(resolve(base))
    if distillers:
        assert cfg.KD.TEACHER == reference.KD.TEACHER
    # the number of the file and of the README
    row = next(line for line in README.splitlines() if f"configs/COCO/{name}.yaml" in line)
    assert row.rstrip(" |").endswith(f"{ap}")
    text = (PROJECT / f"configs/COCO/{name}.yaml").read_text().replace("\n# ", " ")
    assert f"Published AP {ap}" in text


def test_search_from_x101_favours_ap():
    """A.1.4: alpha is 0.1 for X101 and 0.4 for the others."""
    alphas = {n: _config(f"search_{n}").SEARCH.SCORE.ALPHA for n in ("r18", "r50", "r101", "x101")}
    assert alphas == {"r18": 0.4, "r50": 0.4, "r101": 0.4, "x101": 0.1}
    base, search = _config("base_x101"), _config("search_x101")
    encodings = {cfg.MODEL.MORPH_RESNET.ENCODING for cfg in (base, search)}
    assert encodings == {str(resolve("x101_32x4d"))}
    assert search.MODEL.WEIGHTS == f"{base.OUTPUT_DIR}/model_final.pth"


def test_classifier_of_x101_becomes_the_base_backbone():
    """A ResNeXt-101 32x4d in torchvision's names, as timm's is: same features, nothing left."""
    reference = torchvision.models.ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    randomise_norms(reference)
    converted = convert_torchvision(reference.state_dict(), prefix="")
    body = MorphResNet(resolve("x101_32x4d"), out_features=("res5",)).eval()
    body.load_state_dict(converted.state_dict)
    layers = torch.nn.Sequential(*list(reference.eval().children())[:-2])
    x = images(64, 64, 1)
    with torch.no_grad():
        expected, features = layers(x), body(x)["res5"]
    largest = expected.abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * largest)
