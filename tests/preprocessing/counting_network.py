"""A network that says how many pictures it was given together."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

COUNTED = -1.0
"""Stands for a hundredth of the number of pictures."""


def write_counting_network(path: Path, input_hw: tuple[int, int], output: np.ndarray) -> Path:
    """A network (N, 3, *input_hw) that gives `output` for every picture, and N / 100 where that is COUNTED."""
    counted = output == COUNTED
    nodes = [
        helper.make_node("Shape", ["input"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["num"]),
        helper.make_node("Cast", ["num"], ["float_num"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float_num", "hundred"], ["share"]),
        helper.make_node("Mul", ["share", "counted"], ["count"]),
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "column"], ["zeros"]),
        helper.make_node("Sum", ["count", "zeros", "rest"], ["output"]),
    ]
    constants = {
        "first": np.array(0), "hundred": np.float32(100), "zero": np.zeros(1, np.float32),
        "column": np.array([-1] + [1] * output.ndim), "counted": counted[None].astype(np.float32),
        "rest": np.where(counted, 0, output)[None].astype(np.float32),
    }  # fmt: skip
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    pictures = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, *input_hw])
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", *output.shape])
    graph = helper.make_graph(nodes, "counting", [pictures], [result], initial)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path
