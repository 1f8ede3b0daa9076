"""Deployment: a frozen model as a file for another runtime, and the comparison of any two models.

`exporting` holds the verb `export`, `onnx/` how an ONNX file is made and run, `comparing/` how two models are
compared: the verb `verify`, and the check of every file that `export` writes.
"""
