"""Explanations as files that run without torch."""

from bcoskit.export._export import OnnxExport, export_onnx

__all__ = ["OnnxExport", "export_onnx"]
