# SPDX-License-Identifier: Apache-2.0
"""Other people's layers over a weight in MXFP4, for CUDA, as their packages have them: codes [O, I / 2] and scales [O, I / 32], uint8,
whose bytes they lay out anew beforehand."""

from collections.abc import Callable

from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]


def marlin(codes: Tensor, scales: Tensor, bias: Tensor) -> Layer:
    """vLLM's."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as marlin

    O, I = len(codes), 2 * codes.shape[1]
    layer = nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition, layer.params_dtype = O, I, bias.dtype
    for name, t in {"weight": codes, "weight_scale": scales, "bias": bias}.items():
        setattr(layer, name, nn.Parameter(t.clone(), requires_grad=False))
    marlin.prepare_fp4_layer_for_marlin(layer)
    given = layer.weight, layer.weight_scale, None, layer.workspace, O, I, layer.bias
    return lambda x: marlin.apply_fp4_marlin_linear(x, *given)


def humming(codes: Tensor, scales: Tensor, bias: Tensor) -> Layer:
    """humming-kernels', whose kernel is compiled at the first call."""
    from humming.layer import HummingLayer

    sizes = {"shape_n": len(codes), "shape_k": 2 * codes.shape[1]}
    layer = HummingLayer(**sizes, weight_config={"quant_method": "mxfp4"}, has_bias=True, torch_dtype=bias.dtype)
    layer.to(codes.device)
    layer.load_from_tensors({"weight": codes, "weight_scale": scales, "bias": bias})
    layer.transform()
    return layer
