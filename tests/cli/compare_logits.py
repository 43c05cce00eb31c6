"""Logits of what chain.sh exported beside those of its runs, each opened by its own library: at most 1e-5 apart."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import transformers
from PIL import Image

import beit_fast
from beit_fast.models import BeitForSemanticSegmentation

images = sorted(Path(sys.argv[1]).rglob("*.jpg"))[:3]
pixels = [np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in images]
views = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in pixels])


def onnx(folder):
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: views.numpy()})[0])


def exported(folder):
    return torch.export.load(f"{folder}/model.pt2").module()(views)


segmentor = BeitForSemanticSegmentation.from_pretrained
with torch.no_grad():
    classes = beit_fast.Beit.from_pretrained("runs/finetune")(views)
    segments = segmentor("runs/segment").predict(views)
    pairs = {
        "create_model": (classes, beit_fast.create_model(pretrained="runs/finetune").eval()(views)),
        "timm": (classes, timm.create_model("local-dir:exported/timm", pretrained=True).eval()(views)),
        "transformers": (
            classes,
            transformers.AutoModelForImageClassification.from_pretrained("exported/transformers").eval()(views).logits,
        ),
        "onnx": (classes, onnx("exported/onnx")),
        "torch-export": (classes, exported("exported/torch-export")),
        "safetensors": (classes, beit_fast.Beit.from_pretrained("exported/safetensors")(views)),
        "segment onnx": (segments, onnx("exported/segment-onnx")),
        "segment torch-export": (segments, exported("exported/segment-torch-export")),
        "segment safetensors": (segments, segmentor("exported/segment-safetensors").predict(views)),
    }
for name, (expected, found) in pairs.items():
    difference, spread = float((expected - found).abs().max()), float(expected.std())
    print(f"{name}: {difference:.1e} of logits that spread by {spread:.1e}")
    assert difference <= 1e-5
    assert spread > 1e-6
