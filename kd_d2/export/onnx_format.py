"""Graphs as ONNX files."""

import io
import warnings
from typing import Any, Callable, Dict

import torch
from torch import Tensor

from .graph import DetectionGraph, Detections

__all__ = ["OPSET", "load_onnx", "require_onnx", "to_onnx"]

# The first one with RoiAlign as Detectron2 aligns is 16.
OPSET = 17


def require_onnx() -> None:
    """
    Raises:
        ImportError: a package is missing; says how to install it.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Writing ONNX needs the package {error.name}: run `pip install onnx onnxruntime`."
        ) from error


def to_onnx(graph: DetectionGraph, example: Tensor, metadata: Dict[str, str]) -> bytes:
    """The file of a graph, with the number and size of images free.

    Args:
        graph: built with the operators :data:`.operators.ONNX`.
        example: (N, 3, H, W) of the type that the file shall take.
        metadata: stored in the file's ``metadata_props``.
    """
    import onnx

    free = {"images": {0: "num_images", 2: "height", 3: "width"}}
    free.update({name: {0: "num_images"} for name in Detections._fields})
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # Warns of each Python number in the graph; that they may be constants is checked later.
        warnings.simplefilter("ignore")
        # The exporter behind dynamo=True does not record loops over data, nor suppression.
        torch.onnx.export(
            graph,
            (example,),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(Detections._fields),
            dynamic_axes=free,
        )
    model = onnx.load_from_string(buffer.getvalue())
    # The exporter loses sight of the sizes that are fixed.
    for output in model.graph.output:
        sizes = ["num_images", graph.max_detections, 4]
        for size, dim in zip(sizes, output.type.tensor_type.shape.dim):
            dim.Clear()
            setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def load_onnx(data: bytes) -> Callable[[Tensor], Detections]:
    """The graph in ONNX Runtime, on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    dtype = {"tensor(uint8)": torch.uint8}.get(session.get_inputs()[0].type, torch.float32)

    def run(images: Tensor) -> Detections:
        outputs: Any = session.run(list(Detections._fields), {"images": images.to(dtype).numpy()})
        return Detections(*map(torch.as_tensor, outputs))

    return run
