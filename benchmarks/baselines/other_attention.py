"""Attention with a bias gradient by libraries that are rarely installed: cuDNN's graph API and cuEquivariance.

Both take q, k, v (B, N, H, K) and bias (H, N, N) or None, and give (B, N, H, K). Neither has run on a GPU here yet;
what fails at its first call is shown as unavailable with its message.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Unavailable

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def triangle_attention() -> Attention:
    """cuEquivariance's, whose bias (1, 1, H, Q, K) is shared by all rows of a batch: here, by all images."""
    _require("cuequivariance_torch", "cuequivariance-torch")
    from cuequivariance_torch import triangle_attention as attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        if bias is None:
            raise Unavailable("triangle attention needs a bias")
        parts = [x.transpose(1, 2).unsqueeze(0).contiguous() for x in (q, k, v)]  # (1, B, H, N, K)
        out: Tensor = attention(*parts, bias=bias[None, None], scale=scale)
        return out[0].transpose(1, 2)

    return attend


def cudnn_graph() -> Attention:
    """cuDNN's fused attention by its graph API, dBias included."""
    _require("cudnn", "nvidia-cudnn-frontend")
    import cudnn

    handle = cudnn.create_handle()
    graphs: dict[Any, Any] = {}

    def build(tensors: dict[str, Tensor], outputs: dict[str, Tensor], scale: float, backward: bool) -> Any:
        kind = cudnn.data_type.BFLOAT16 if tensors["q"].dtype == torch.bfloat16 else cudnn.data_type.HALF
        wide = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle
        )  # fmt: skip
        nodes = {name: graph.tensor_like(tensor) for name, tensor in tensors.items()}
        if backward:
            more = {"dBias": graph.tensor_like(outputs["dBias"])} if "dBias" in outputs else {}
            made = graph.sdpa_backward(**nodes, attn_scale=scale, **more)
            nodes |= dict(zip(("dQ", "dK", "dV"), made, strict=True)) | more
        else:
            made = graph.sdpa(**nodes, attn_scale=scale, is_inference=False)
            nodes |= dict(zip(("o", "stats"), made, strict=True))
        for name, tensor in outputs.items():
            node = nodes[name].set_output(True).set_dim(list(tensor.shape)).set_stride(list(tensor.stride()))
            node.set_data_type(wide if tensor.dtype == torch.float32 else kind)
        graph.build([cudnn.heur_mode.A])
        return graph, nodes, torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=tensors["q"].device)

    def execute(tensors: dict[str, Tensor], outputs: dict[str, Tensor], scale: float, backward: bool) -> None:
        key = (backward, "bias" in tensors, tensors["q"].shape, tensors["q"].dtype)
        if key not in graphs:
            graphs[key] = build(tensors, outputs, scale, backward)
        graph, nodes, workspace = graphs[key]
        graph.execute({nodes[name]: tensor for name, tensor in (tensors | outputs).items()}, workspace, handle=handle)

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
            tensors = {"q": q, "k": k, "v": v} | ({} if bias is None else {"bias": bias})
            batch, heads, tokens, _ = q.shape
            out = torch.empty_like(q)
            stats = torch.empty(batch, heads, tokens, 1, dtype=torch.float32, device=q.device)
            execute(tensors, {"o": out, "stats": stats}, scale, False)
            ctx.save_for_backward(q, k, v, out, stats, *([] if bias is None else [bias]))
            ctx.scale = scale
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            q, k, v, out, stats, *bias = ctx.saved_tensors
            tensors = {"q": q, "k": k, "v": v, "o": out, "dO": grads[0].contiguous(), "stats": stats}
            outputs = {name: torch.empty_like(x) for name, x in (("dQ", q), ("dK", k), ("dV", v))}
            if bias:
                tensors["bias"], outputs["dBias"] = bias[0], torch.empty_like(bias[0])
            execute(tensors, outputs, ctx.scale, True)
            return outputs["dQ"], outputs["dK"], outputs["dV"], outputs.get("dBias"), None

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        parts = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        wide = None if bias is None else bias.to(q.dtype)[None].contiguous()
        out: Tensor = Attend.apply(*parts, wide, scale)
        return out.transpose(1, 2)

    return attend
