"""The deformable convolution for ONNX against torchvision's."""

import io
import warnings

import pytest
import torch
from torchvision.ops import deform_conv2d

from kd_d2.export.deform_conv import sampled_deform_conv2d
from kd_d2.export.onnx_format import OPSET


def case(seed=0, kernel=(3, 3), size=(7, 9), images=2, offset_std=2.0, **options):
    """Arguments; the offsets lead out of the map now and then."""
    torch.manual_seed(seed)
    stride, padding, dilation = (
        (x, x) if isinstance(x, int) else x
        for x in (options.get(k, d) for k, d in (("stride", 1), ("padding", 1), ("dilation", 1)))
    )
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    taps = kernel[0] * kernel[1]
    return {
        "input": torch.randn(images, 4, *size),
        "offset": torch.randn(images, 2 * taps, *out) * offset_std,
        "weight": torch.randn(5, 4, *kernel),
        "bias": torch.randn(5),
        "mask": torch.rand(images, taps, *out),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": (1, 1), "padding": 0},
        {"kernel": (5, 3), "padding": (2, 1)},
        {"stride": 2, "dilation": (1, 2), "padding": (1, 2)},
        {"size": (1, 1)},
        {"size": (1, 40), "offset_std": 10.0},
        {"images": 1, "offset_std": 0.0},
    ],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_equals_torchvision(options, with_mask):
    arguments = case(**options)
    if not with_mask:
        arguments["mask"] = None
    expected = deform_conv2d(**arguments)
    torch.testing.assert_close(sampled_deform_conv2d(**arguments), expected, atol=1e-4, rtol=1e-5)


def test_taps_on_the_border_read_what_is_left_of_the_map():
    """By hand: a 1x1 kernel half a cell outside of a map of ones reads 1/2, a whole one 0."""
    for shift, value in ((0.0, 1.0), (-0.5, 0.5), (-1.0, 0.0), (-3.0, 0.0), (1.5, 0.5)):
        offset = torch.tensor([0.0, shift]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
        read = sampled_deform_conv2d(torch.ones(1, 1, 1, 2), offset, torch.ones(1, 1, 1, 1))
        assert read[0, 0, 0, 0].item() == pytest.approx(value if shift <= 0 else 0.5, abs=1e-6)


def test_in_onnx_runtime_with_another_size_than_recorded():
    onnxruntime = pytest.importorskip("onnxruntime")
    names = ["input", "offset", "weight", "bias"]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return sampled_deform_conv2d(*tensors, padding=1)

    recorded = case()
    file = io.BytesIO()
    free = {0: "n", 2: "h", 3: "w"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Module(),
            tuple(recorded[name] for name in names),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            dynamic_axes={"input": free, "offset": free},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    other = case(seed=1, size=(12, 5), images=3)
    (found,) = session.run(None, {name: other[name].numpy() for name in names})
    expected = deform_conv2d(*(other[name] for name in names), padding=1)
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("weight, offset", [((4, 2, 3, 3), 18), ((4, 4, 3, 3), 36)])
def test_groups_are_refused(weight, offset):
    with pytest.raises(ValueError, match="one group"):
        sampled_deform_conv2d(
            torch.zeros(1, 4, 5, 5), torch.zeros(1, offset, 5, 5), torch.zeros(weight), padding=1
        )
