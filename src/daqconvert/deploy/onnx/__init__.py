"""How a frozen model becomes an ONNX file of packed codes, and how such a file is run.

From the bottom up: `frozen_operators` (a frozen layer as operators of its own while torch exports it), `lowering`
(torch to an ONNX graph of those operators), `expansion` (the operators written out in standard ONNX, with `unpacking`
for weights, `code_tensors` for what lies between layers and `integer_nodes` for products), `runtime` (ONNX Runtime)
and `hardware` (what its integer kernels compute on this machine).
"""
