"""TensorRT for RTX under the name that the agent imports, building for an RTX 30 GPU that is not here."""

import sys

import tensorrt_rtx as trt

_create = trt.Builder.create_builder_config


def _create_for_sm86(builder):
    config = _create(builder)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    return config


trt.Builder.create_builder_config = _create_for_sm86
sys.modules["tensorrt"] = trt
