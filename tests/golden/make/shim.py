"""Lets a torchvision without its compiled part be imported: two operators are declared, none is used."""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

try:
    import types

    import av

    if not hasattr(av, "option"):  # newer PyAV; only an annotation names it
        av.option = types.SimpleNamespace(Option=object)
except ImportError:
    av = None
